"""Losses that are not finite and extreme settings are reported, and destroy no good state."""

import json
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from tests.conftest import jpeg
from tests.faults.helpers import write_tar
from tests.training.steps import around_each_step

SMALL = ["--model", "tiny", "--epochs", "1", "--effective-batch-size", "32", "--precision", "fp32"]
SMALL += ["--micro-batch-size", "16", "--num-workers", "0", "--stop-on", "never", "--device", "cpu"]


def train(data: Path, out: Path, *more: str) -> int:
    return run(["train", *SMALL, "--data-dir", str(data), "--output-dir", str(out), *more])


def steps(out: Path, scenario: str = "dual_lora") -> list[dict]:
    lines = (out / scenario / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "step"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    content = torch.load(out / "dual_lora_checkpoint.pt", weights_only=True)
    return content["model_state_dict"]


def poison(monkeypatch, at: range) -> None:
    """Make the gradients of these steps (from 0) infinite, as after an overflow."""

    def poisoned(real, step, micro_batches):
        loss = real(step, micro_batches)
        if step in at:
            _, parameter = next(iter(real.model.trainable()))
            parameter.grad.fill_(float("inf"))
        return loss

    around_each_step(monkeypatch, poisoned)


def test_a_step_whose_gradient_is_not_finite_is_skipped(catalogue, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(1, 2))
    assert train(catalogue, tmp_path) == 0
    assert [record["grad_norm"] is None for record in steps(tmp_path)] == [False, True, False]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_many_in_a_row_end_the_run_with_the_last_good_state(
    catalogue, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, range(4, 100))
    more = ["--epochs", "8", "--checkpoint-every", "1"]
    assert train(catalogue, tmp_path, *more) == 6
    said = capsys.readouterr().err
    assert "error: the gradient was not finite for 10 steps in a row" in said
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert run(["evaluate", str(tmp_path / "dual_lora"), "--data-dir", str(catalogue)]) == 0


@pytest.mark.slow
def test_a_learning_rate_that_explodes_never_replaces_a_good_state(catalogue, tmp_path, capsys):
    code = train(catalogue, tmp_path, "--lr", "1000", "--epochs", "3", "--scenario", "full")
    said = capsys.readouterr().err
    assert code in (0, 6)
    if code == 6:
        assert "error:" in said and "lower --lr" in said
    saved = tmp_path / "full_checkpoint.pt"
    if saved.exists():
        content = torch.load(saved, weights_only=True)
        assert all(torch.isfinite(v).all() for v in content["model_state_dict"].values())
    assert "unexpected" not in said


def test_a_learning_rate_of_zero_changes_nothing(catalogue, tmp_path):
    assert train(catalogue, tmp_path, "--lr", "0", "--lora-dropout", "0") == 0
    lora_b = [value for name, value in weights(tmp_path).items() if "lora_B" in name]
    assert lora_b and all(not value.any() for value in lora_b)


def test_no_clipping(catalogue, tmp_path):
    assert train(catalogue, tmp_path, "--grad-clip", "0") == 0
    assert all(record["grad_norm"] > 0 for record in steps(tmp_path))


def test_a_rank_above_the_matrix(catalogue, tmp_path):
    assert train(catalogue, tmp_path, "--lora-r", "300", "--lora-alpha", "300") == 0


def test_effective_batch_above_the_data_and_no_multiple_of_the_micro_batch(
    catalogue, tmp_path, capsys
):
    more = ["--effective-batch-size", "1000", "--micro-batch-size", "7"]
    assert train(catalogue, tmp_path, *more) == 0
    assert "each step uses all of them" in capsys.readouterr().err
    assert [record["pairs"] for record in steps(tmp_path)] == [96]


@pytest.mark.parametrize("same", ["caption", "image", "both"])
@pytest.mark.parametrize("positives", ["pair", "caption"])
def test_all_captions_equal_or_one_image_repeated(tmp_path, same, positives):
    from clipft.data.demo.catalogue import render_pair

    for split, first in (("train", 0), ("val", 100)):
        members = []
        for number in range(first, first + 12):
            pair = render_pair(7, first if same != "caption" else number)
            words = "a chair" if same != "image" else f"chair number {number}"
            members += [(f"{number}.jpg", jpeg(pair)), (f"{number}.txt", words.encode())]
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "00000.tar", members)
    more = ["--effective-batch-size", "6", "--micro-batch-size", "3", "--positives", positives]
    out = tmp_path / "out"
    assert train(tmp_path, out, *more) == 0
    assert all(record["loss"] is not None for record in steps(out))
    assert all(torch.isfinite(value).all() for value in weights(out).values())
