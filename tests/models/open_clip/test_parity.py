"""Every plain vision transformer of open_clip is converted to equal embeddings."""

import open_clip
import pytest

from tests.models.open_clip.parity import measure

MAPPED = [name for name in open_clip.list_models() if name.startswith(("ViT-", "vit_"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPED)
def test_every_vision_transformer_is_converted_exactly(name):
    row = measure(name, full=False)
    if "CLIPA" in name:  # no norm before the first layer, no end token
        assert row["refused"] == "its image tower has no norm before its first layer"
        return
    assert row["used"] == row["tensors"]
    assert row["cosine"] > 0.99999


def test_a_small_configuration_of_the_registry_is_converted_exactly():
    row = measure("ViT-S-32-alt", full=False)
    assert (row["becomes"], row["used"]) == ("CLIPModel", row["tensors"])
    assert row["cosine"] > 0.99999 and row["difference"] < 2e-6
