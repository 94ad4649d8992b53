"""The penalty on the drift from the pretrained embeddings: exact, however a step is divided."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.distributed.collectives import ALONE
from clipft.embedding.load import load_model
from clipft.embedding.towers import make_towers
from clipft.runs.checkpoint import load_checkpoint, save_checkpoint
from clipft.training.step.preservation import HeldGeneralSet, HeldPairs
from tests.conftest import write_shard
from tests.training.process_helpers import results
from tests.training.step.sharded_runs import Run, figures
from tests.training.step.test_gradcache import (
    ALL_ROOM,
    NO_ROOM,
    accumulation,
    assert_same,
    cut,
    gradients,
    load,
    pad_token_id,
    pairs,
)

__all__ = ["pairs"]  # a fixture
WEIGHT = 7.0


@cache
def pretrained():
    given = {"model": "tiny", "scenario": "zero_shot", "device": "cpu", "precision": "fp32"}
    loaded = load_model(load_settings(given, environ={}).values)
    return loaded, make_towers(loaded, 1, pad_token_id(loaded))


def held(step, general=None):
    """The accumulation ``step`` with embeddings that are held."""
    towers = pretrained()[1]
    kind = HeldPairs(WEIGHT, towers)
    if general:
        kind = HeldGeneralSet(WEIGHT, towers, step.towers, general)
    return replace(step, preservation=kind)


def drift(loaded, batch):
    """The mean of 1 - cosine over all images and captions of a batch, in plain words."""
    before = pretrained()[0].model.eval()
    with torch.no_grad():
        old = before(batch.pixel_values, batch.input_ids)
    new = loaded.model(batch.pixel_values, batch.input_ids)
    cosines = [(a * b).sum(1).mean() for a, b in zip(old, new, strict=True)]
    return 1 - sum(cosines) / 2


@pytest.mark.parametrize(("micro", "room"), [(1, ALL_ROOM), (5, NO_ROOM)])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("scenario", ["dual_lora", "linear_probe", "full"])
def test_the_gradient_is_that_of_one_large_batch(scenario, general, micro, room, pairs):
    loaded = load(scenario)
    step = accumulation(loaded, room=room)
    further = replace(pairs.part(slice(0, 8)), pixel_values=255 - pairs.pixel_values[:8])
    expected_drift = drift(loaded, further if general else pairs)
    loss = step.loss(*loaded.model(pairs.pixel_values, pairs.input_ids))
    (loss + WEIGHT * expected_drift).backward()
    expected = gradients(loaded)
    step = held(step, general=8 if general else None)
    found = step(0, cut(pairs, micro), general=cut(further, micro) if general else ())
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert step.drift == pytest.approx(expected_drift.item(), rel=1e-3)
    assert_same(gradients(loaded), expected)


def test_what_does_not_move_is_not_held(pairs):
    loaded = load("text_lora")
    step = held(accumulation(loaded))
    step(0, [pairs])
    before = pretrained()[0].model.eval()
    with torch.no_grad():
        old = before.encode_texts(pairs.input_ids)
        new = loaded.model.encode_texts(pairs.input_ids)
    assert step.drift == pytest.approx((1 - (old * new).sum(1)).mean().item() / 2, rel=1e-3)


SMALL = {"scenario": "dual_lora", "lora_dropout": 0.1, "preserve": 20.0, "lr": 3e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """47 training pairs, 3 of them bad, and a general set of 26, one of them bad."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train" / "0.tar", range(47), bad=(4, 17, 40))
    write_shard(folder / "val" / "0.tar", range(1000, 1012))
    write_shard(folder / "general" / "train" / "0.tar", range(3000, 3026), bad=(3007,))
    return folder


def test_the_first_step_has_no_drift_and_the_weight_holds_later_ones(data):
    def drifts(weight: float, **given) -> list[float]:
        given = {**SMALL, "data_dir": data, "lora_dropout": 0.0, **given, "preserve": weight}
        run = Run.of(given, ALONE)
        return run.train()[2::3]

    free, held = drifts(1e-6), drifts(50.0)
    assert free[0] == pytest.approx(0, abs=1e-12) and held[0] == pytest.approx(0, abs=1e-12)
    assert held[-1] < free[-1] / 2
    augmented = drifts(1e-6, augmentation="advanced")  # both models see the same augmented image
    assert augmented[0] == pytest.approx(0, abs=1e-12) and augmented[-1] > 1e-6


@pytest.mark.parametrize("general", [False, True])
def test_two_processes_have_the_figures_of_one(general, data, tmp_path):
    given = {**SMALL, "data_dir": str(data)}
    if general:
        given["preserve_data"] = str(data / "general")
    body = f"""
    from pathlib import Path
    from tests.training.step.sharded_runs import figures
    result = figures(json.loads({json.dumps(given)!r}), processes, Path({str(tmp_path)!r}) / "2.pt")
"""
    alone = figures(given, ALONE, tmp_path / "1.pt")["told"]
    for found in results(body, seconds=200):
        assert found["told"] == pytest.approx(alone, rel=1e-4, abs=1e-6)


def train(data, out, *options: str) -> int:
    small = ("--model", "tiny", "--mini-train", "--num-workers", "0", "--precision", "fp32")
    where = ("--data-dir", str(data), "--output-dir", str(out))
    return run(["train", *small, *where, *options])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--preserve-data", "{data}/general"), 2, "no effect without a weight"),
        (("--preserve", "1", "--accumulation", "local"), 2, "cannot be combined"),
        (("--preserve", "1", "--preserve-data", "{data}/nowhere"), 3, "with --preserve-data"),
        (("--preserve", "-1"), 2, "--preserve"),
    ],
)
def test_what_cannot_be_held_is_refused(options, code, said, data, tmp_path, capsys):
    assert train(data, tmp_path, *(word.format(data=data) for word in options)) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("dual_lora*"))


def test_a_run_goes_on_with_its_own_general_set_alone(data, tmp_path, capsys):
    held = ("--preserve", "5", "--preserve-data", str(data / "general"))
    assert train(data, tmp_path, *held, "--max-bad", "0.5") == 0
    path = tmp_path / "dual_lora" / "metrics.jsonl"
    steps = [line for line in map(json.loads, path.open()) if line["kind"] == "step"]
    assert steps[0]["drift"] == pytest.approx(0, abs=1e-12) and steps[-1]["drift"] > 1e-6
    other = data / "val"
    resumed = ("--epochs", "1", "--max-bad", "0.5", "--resume-from-checkpoint")
    again = ("--preserve", "5", "--preserve-data", str(other), *resumed)
    checkpoint = tmp_path / "dual_lora_checkpoint.pt"
    save_checkpoint(checkpoint, {**load_checkpoint(checkpoint), "finished": False})
    assert train(data, tmp_path, *again) == 2
    assert "is not the general set of the checkpoint" in capsys.readouterr().err
