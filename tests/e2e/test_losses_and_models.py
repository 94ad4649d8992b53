"""Other losses, adapters and checkpoints than the default's, as a user runs them."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.data.loader import training_batches
from clipft.distributed.collectives import ALONE
from clipft.training.loop import fit
from clipft.training.prepare import prepare
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState
from tests.models.checkpoints import write_siglip

SMALL = [
    *("--epochs", "1", "--effective-batch-size", "32", "--micro-batch-size", "16"),
    *("--num-workers", "0", "--precision", "fp32", "--lora-r", "4", "--stop-on", "never"),
]


def train(catalogue: Path, out: Path, *more: str) -> int:
    return run(["train", *SMALL, "--data-dir", str(catalogue), "--output-dir", str(out), *more])


def lines(folder: Path, kind: str) -> list[dict]:
    all_of_them = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in all_of_them if line["kind"] == kind]


@pytest.mark.parametrize("scenario", ["dual_lora", "linear_probe"])
def test_siglip_trains_and_is_evaluated(scenario, catalogue, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    write_siglip(model)
    more = ("--model", str(model), "--scenario", scenario, "--augmentation", "none")
    assert train(catalogue, tmp_path / "out", *more) == 0
    folder = tmp_path / "out" / scenario
    untouched, after = lines(folder, "epoch")
    assert after["val_loss"] < untouched["val_loss"]
    data = ("--data-dir", str(catalogue), "--json", "--num-workers", "0", "--precision", "fp32")
    capsys.readouterr()
    assert run(["evaluate", str(folder), *data]) == 0
    told = json.loads(capsys.readouterr().out)
    for direction, figures in after["retrieval"].items():
        if direction not in ("pairs", "queries"):
            assert told[direction] == pytest.approx(figures, abs=1e-3)


def test_groups_bring_a_floor_into_the_figures(catalogue, tmp_path):
    more = ("--model", "tiny", "--positives", "group", "--group-field", "type")
    assert train(catalogue, tmp_path, *more) == 0
    folder = tmp_path / "dual_lora"
    assert all(0 < line["loss_floor"] < line["loss"] for line in lines(folder, "step"))
    assert all(0 < line["val_floor"] < line["val_loss"] for line in lines(folder, "epoch"))


@pytest.mark.parametrize(
    "given",
    [
        {"lora_init": "pissa", "lora_targets": "all"},
        {"lora_dora": True, "logit_scale": "trained", "lr_scale": 0.01},
        {"loss": "siglip", "positives": "caption", "positives_mode": "mask"},
        {"scenario": "full", "layer_decay": 0.7, "gradient_checkpointing": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been(given, catalogue, tmp_path):
    """All that these settings make is in the checkpoint, or made anew the same."""
    small = {"effective_batch_size": 12, "micro_batch_size": 8, "num_workers": 0, "epochs": 2}
    small |= {"model": "tiny", "data_dir": catalogue, "lora_r": 4, "max_train_pairs": 36}
    given = {"lr": 0.001, "precision": "fp32", **small, **given}
    settings = load_settings(given, environ={}).values

    def started() -> tuple[RunSetup, TrainState]:
        setup = prepare(settings, lambda note: None, ALONE)
        steps = setup.epoch_plan.steps
        return setup, TrainState(setup.loaded.model, setup.make_optimizer(), steps)

    def advance(setup: RunSetup, state: TrainState, steps: int) -> None:
        preprocessing, plan = setup.encoding.preprocessing, setup.epoch_plan
        batches = training_batches(
            setup.train, preprocessing, plan, state.position, 2, setup.loader_options
        )
        for _ in islice(
            fit(state, batches, setup.make_accumulation(state.optimizer, print)), steps
        ):
            pass

    whole, cut, resumed = started(), started(), started()
    advance(*whole, 5)
    advance(*cut, 2)
    torch.save(cut[1].state_dict(), tmp_path / "state.pt")
    resumed[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(*resumed, 3)
    ours, theirs = resumed[1].model.trainable_state(), whole[1].model.trainable_state()
    assert resumed[1].loss == whole[1].loss
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
