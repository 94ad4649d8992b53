"""What is exported for open_clip opens there, with equal embeddings."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipft.cli.app import run
from clipft.core.errors import ModelError, UsageError
from clipft.data.demo.catalogue import render_pair
from clipft.export.export import unfit_formats
from clipft.export.open_clip import check_open_clip, open_clip_lacks, write_open_clip
from clipft.export.target import chosen_formats
from clipft.models.huggingface import merged
from clipft.models.pretrained import load_pretrained
from tests.exports import opened, write_checkpoint
from tests.models.checkpoints import write_clip, write_siglip

TEXTS = ["a light oak chair", "A black LAMP, that stands &amp; shines!", "chair " * 90]


def by_open_clip(folder: Path) -> list[torch.Tensor]:
    """Embed with open_clip's own preprocessing, tokenizer and encoders."""
    place = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    pixels = torch.stack([preprocess(render_pair(3, number).image) for number in range(3)])
    with torch.no_grad():
        return [
            model.eval().encode_image(pixels, normalize=True),
            model.encode_text(open_clip.get_tokenizer(place)(TEXTS), normalize=True),
        ]


def by_clipft(model, inputs) -> list[torch.Tensor]:
    from clipft.data.captions.tokenizer import CaptionEncoder, padded
    from clipft.data.images.augmentation import Transform

    transform = Transform("none", inputs.image_size, inputs.squashed)
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(TEXTS)], encoder.eos_token_id)
    pixels = torch.stack([transform(render_pair(3, number).image, 0) for number in range(3)])
    with torch.no_grad():
        return list(model.eval()(pixels, ids))


@pytest.mark.parametrize("scenario", ["dual_lora", "full"])
def test_open_clip_computes_the_same(scenario, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path, scenario)
    out = tmp_path / "out"
    given = ["export", str(checkpoint), str(out), "--format", "open_clip", "--json"]
    assert run(given) == 0
    assert json.loads(capsys.readouterr().out)["open_clip_difference"] < 1e-5
    loaded = opened(checkpoint).loaded
    images, texts = by_clipft(loaded.model, loaded.base.inputs)
    found = by_open_clip(out)
    torch.testing.assert_close(found[1], texts, atol=1e-5, rtol=0)
    # Pixels may differ by one step of 255: images differ among each other by far more
    assert (found[0] - images).abs().max() < (images[0] - images[1]).abs().max() / 10
    scale = load_file(out / "open_clip_model.safetensors")["logit_scale"]
    assert torch.equal(scale, loaded.model.logit_scale)
    card = (out / "README.md").read_text()
    assert "library_name: open_clip" in card and "local-dir:PATH/TO/THIS/FOLDER" in card


def test_clips_own_tokenizer_is_left_to_open_clip(tmp_path):
    """open_clip has it, and published models do not carry it either."""
    base = load_pretrained(str(write_clip(tmp_path / "model", 32, act="gelu")))
    write_open_clip(base.model, base, None, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert check_open_clip(tmp_path / "out", base.model, base) < 1e-6
    again = load_pretrained(f"local-dir:{tmp_path / 'out'}")
    assert again.fingerprint() == base.fingerprint()


def test_the_bias_of_the_sigmoid_loss_goes_with_a_clip(tmp_path):
    """transformers' CLIP has no place for it, open_clip's has."""
    checkpoint = write_checkpoint(tmp_path, "full", loss="siglip")
    out = tmp_path / "out"
    assert run(["export", str(checkpoint), str(out), "--format", "open_clip"]) == 0
    bias = opened(checkpoint).loaded.model.logit_bias
    model = open_clip.create_model(f"local-dir:{out}")
    assert torch.equal(model.logit_bias, bias)
    assert "cannot store" not in (out / "README.md").read_text()


def test_what_open_clip_lacks_is_refused_or_skipped(tmp_path):
    write_siglip(tmp_path)
    found = opened(tmp_path)
    why = "timm has no image tower of SigLIP with 2 layers of width 32 for 64 pixels in patches"
    assert open_clip_lacks(found.loaded.base).startswith(why)
    with pytest.raises(UsageError, match="open_clip has no model like this one: timm has no"):
        chosen_formats("open_clip", unfit_formats(found))
    formats, skipped = chosen_formats("all", unfit_formats(found))
    assert "open_clip" not in formats and set(skipped) == {"peft", "open_clip"}


def test_other_embeddings_are_refused(tmp_path):
    base = load_pretrained("tiny")
    write_open_clip(base.model, base, None, tmp_path)
    with torch.no_grad():
        base.model.visual_projection.weight.mul_(torch.linspace(0, 1, 128))
    with pytest.raises(
        ModelError, match="open_clip gives different embeddings: components differ by"
    ):
        check_open_clip(tmp_path, base.model, base)


def test_a_norm_or_an_activation_of_its_own_is_written(tmp_path):
    base = load_pretrained("tiny")
    for tower in (base.model.config.vision_config, base.model.config.text_config):
        tower.hidden_act, tower.layer_norm_eps = "gelu_pytorch_tanh", 1e-3
    base.model.save_pretrained(str(tmp_path / "odd"))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        source = Path(__file__).parents[2] / "clipft" / "models" / "tiny" / name
        (tmp_path / "odd" / name).write_bytes(source.read_bytes())
    odd = load_pretrained(str(tmp_path / "odd"))
    write_open_clip(merged(opened(tmp_path / "odd").loaded.model), odd, None, tmp_path / "out")
    assert check_open_clip(tmp_path / "out", odd.model, odd) < 1e-6
    odd.model.config.text_config.hidden_act = "quick_gelu"
    assert open_clip_lacks(odd) == "its towers have gelu_pytorch_tanh and quick_gelu"
    odd.model.config.text_config.hidden_act = "relu"
    assert open_clip_lacks(odd) == "its activation is relu"
