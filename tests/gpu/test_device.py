"""What must hold on every device: the default run checks it on the CPU, ``make gpu`` on CUDA."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipft.cli.app import run
from clipft.distributed.collectives import ALONE
from clipft.models.dropout import RowMasks
from tests.training.step.sharded_runs import Run

TWO_STEPS = {
    **{"scenario": "dual_lora", "lora_dropout": 0.2, "epochs": 1, "stop_on": "never"},
    **{"max_train_pairs": 40, "max_val_pairs": 20},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def trained(data_dir: Path, **given: Any) -> list[float]:
    """Losses and gradient norms of two steps of 20 pairs, in fp32."""
    return Run.of({**TWO_STEPS, "data_dir": str(data_dir), **given}, ALONE).train()


@pytest.fixture(scope="module")
def on_the_cpu(catalogue) -> list[float]:
    return trained(catalogue, device="cpu")


def test_masks_are_the_same_bits_on_every_device(device):
    """Even of rows that are in another place of another batch."""
    keys = np.arange(7, dtype=np.uint64) * 0x9E3779B97F4A7C15

    def kept(where: str, rows: slice) -> torch.Tensor:
        masks = RowMasks(0.3, where)
        number = [masks.reserve(64), masks.reserve(96)][1]
        masks.use((1, 2, 3), keys[rows], 11)
        return masks.kept(number, 11, 96).cpu()

    whole = kept("cpu", slice(0, 7))
    assert torch.equal(kept(device, slice(0, 7)), whole)
    assert torch.equal(kept(device, slice(2, 5)), whole[2:5])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"micro_batch_size": 20},
        {"graph_memory": 0},
        {"micro_batch_size": 3, "graph_memory": 0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "graph_memory": 0},
        {"augment_on": "device"},
    ],
    ids=str,
)
def test_a_step_is_that_of_the_cpu_however_it_is_cut(device, given, on_the_cpu, catalogue):
    """With dropout, whose masks must be the same in both passes and in every chunk."""
    ours = trained(catalogue, device=device, **given)
    assert len(ours) == 4 and ours == pytest.approx(on_the_cpu, rel=2e-4)


def test_evaluation_is_that_of_the_cpu(device, catalogue, capsys):
    def figures(where: str) -> dict[str, Any]:
        small = ("--num-workers", "0", "--precision", "fp32", "--resamples", "0")
        on = ("--model", "tiny", "--data-dir", str(catalogue), "--device", where)
        assert run(["zero-shot", *on, *small, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["evaluation"]["before"]["paired"]

    ours, expected = figures(device), figures("cpu")
    assert ours["text_to_image"]["queries"] == 40
    for direction, part in expected.items():
        for name, figure in part["figures"].items():
            value = ours[direction]["figures"][name]["value"]
            assert value == pytest.approx(figure["value"], abs=0.03), name  # one of 40 queries


def test_validation_is_that_of_the_cpu(device, catalogue):
    def loss(where: str) -> float:
        given = {**TWO_STEPS, "data_dir": str(catalogue), "device": where}
        return Run.of(given, ALONE).validation_loss()

    assert loss(device) == pytest.approx(loss("cpu"), rel=1e-4)
