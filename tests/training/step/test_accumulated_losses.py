"""Every loss and kind of positives is exact, however the effective batch is split."""

import pytest
import torch

from clipft.cli.progress import epoch_line
from clipft.config.sources import load_settings
from clipft.core.memory import MemoryBudget
from clipft.data.positives import CaptionPositives, GroupPositives
from clipft.embedding.towers import make_towers
from clipft.runs.records import EpochResult, StepResult
from clipft.training.step.gradcache import ExactAccumulation, LocalAccumulation
from clipft.training.step.losses import make_loss
from clipft.training.step.tower_pass import GraphMemory
from tests.training.step.test_gradcache import (
    OFF,
    PAIRS,
    assert_same,
    cut,
    gradients,
    load,
    pad_token_id,
    pairs,
)

__all__ = ["pairs"]  # the fixture

SOURCES = {
    "caption": lambda end: CaptionPositives(end),
    "group": lambda end: GroupPositives(torch.arange(PAIRS) % 5),
}


def made(kind, loaded, source, **given):
    settings = load_settings(given, environ={}).values
    return kind(
        model=loaded.model,
        towers=make_towers(loaded, 1, pad_token_id(loaded)),
        loss=make_loss(settings, loaded.model),
        positives=SOURCES[source](pad_token_id(loaded)),
        scaler=OFF,
        graphs=GraphMemory(lambda: MemoryBudget(0)),
    )


@pytest.mark.parametrize("micro", [5, 12])
@pytest.mark.parametrize("mode", ["soft", "mask"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("source", SOURCES)
def test_exact_is_one_graph_over_the_whole_batch(source, name, mode, micro, pairs):
    loaded = load("dual_lora", loss=name, logit_scale="trained")
    step = made(ExactAccumulation, loaded, source, loss=name, positives_mode=mode)
    groups = step.positives.ids(pairs)
    assert 1 < len(groups.unique()) < PAIRS
    whole = step.loss(*loaded.model(pairs.pixel_values, pairs.input_ids), groups)
    whole.backward()
    expected = gradients(loaded)
    scales = {n.rpartition(".")[2] for n in expected if "logit" in n}
    assert scales == ({"logit_scale"} if name == "clip" else {"logit_scale", "logit_bias"})
    assert step(0, cut(pairs, micro)).item() == pytest.approx(whole.item(), rel=1e-5)
    assert_same(gradients(loaded), expected)
    assert step.lower_bound == step.loss.lower_bound(groups)
    assert (step.loss.lower_bound(groups) > 0) == (name == "clip" and mode == "soft")


def test_the_floor_of_local_losses_is_their_mean(pairs):
    loaded = load("dual_lora")
    step = made(LocalAccumulation, loaded, "group")
    batches = cut(pairs, 7)
    floors = [step.loss.lower_bound(step.positives.ids(batch)) * len(batch) for batch in batches]
    step(0, batches)
    assert step.lower_bound == pytest.approx(sum(floors) / PAIRS)


def test_a_floor_is_told_where_there_is_one():
    step = StepResult(1, 1, 2.0, 0.1, 1.0, 8, 1.0, 0.1, True, loss_floor=0.5)
    assert step.metrics()["loss_floor"] == 0.5
    assert "loss_floor" not in StepResult(1, 1, 2.0, 0.1, 1.0, 8, 1.0, 0.1, True).metrics()
    figures = {"r@1": 0.5, "r@10": 0.5}
    both = {"text_to_image": figures, "image_to_text": figures}
    epoch = EpochResult(1, 1, 2.0, 2.5, both, val_floor=0.25)
    assert epoch.metrics()["val_floor"] == 0.25
    assert "val loss 2.5000 (lower bound 0.2500)" in epoch_line(epoch, 2)
    plain = EpochResult(1, 1, 2.0, 2.5, both)
    assert "floor" not in epoch_line(plain, 2) + str(plain.metrics())
