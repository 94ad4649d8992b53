"""``clipft resume`` with checkpoints that are damaged, foreign, or from another run."""

import shutil
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from clipft.runs.checkpoint import load_checkpoint, previous_of
from tests.e2e.test_train import assert_same_run
from tests.faults.helpers import one_error
from tests.faults.outside import command

NAME = "dual_lora_checkpoint.pt"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("harm", [flip, cut, empty, Path.unlink], ids=lambda harm: harm.__name__)
def test_the_previous_checkpoint_replaces_a_damaged_one(copy, whole, capsys, monkeypatch, harm):
    """The resumed run ends with the same weights as an undisturbed one."""
    monkeypatch.setenv("CLIPFT_CACHE", str(whole / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the undisturbed run
    harm(copy / NAME)
    try:
        assert run(["resume", str(copy / "dual_lora")]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert f"warning: {'no checkpoint ' if harm is Path.unlink else ''}{copy / NAME}" in said
    assert "resuming from the one before it, of step" in said
    aside = copy / "dual_lora_checkpoint.damaged.pt"
    assert aside.exists() == (harm is not Path.unlink)
    assert_same_run(whole / "runs", copy)


@pytest.mark.parametrize("harm", [flip, cut, empty], ids=lambda harm: harm.__name__)
def test_if_both_are_damaged_nothing_starts_from_scratch(copy, catalogue, capsys, harm):
    harm(copy / NAME)
    harm(previous_of(copy / NAME))
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    assert run(["resume", str(copy / "dual_lora")]) == 5
    assert "is damaged: " in one_error(capsys)[0]
    assert run(command(catalogue, copy)) == 5
    assert "is damaged: " in one_error(capsys)[0]
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before


def test_a_checkpoint_of_a_newer_clipft_is_refused(copy, capsys):
    content = load_checkpoint(copy / NAME)
    torch.save({**content, "format_version": 99}, copy / NAME)
    assert run(["resume", str(copy / "dual_lora")]) == 5
    error, hint = one_error(capsys)
    assert "newer clipft" in error and str(previous_of(copy / NAME)) in hint


def test_weights_alone_in_place_of_a_checkpoint_are_refused(copy, capsys):
    shutil.copy(copy / "dual_lora" / "best.pt", copy / NAME)
    assert run(["resume", str(copy / "dual_lora")]) == 5
    assert "holds weights but no run to resume" in one_error(capsys)[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--lora-r", "8"), "lora_r 16 -> 8"),
        (("--lr", "0.5"), "lr 0.004 -> 0.5"),
        (("--epochs", "4"), "epochs 3 -> 4"),
        (("--effective-batch-size", "16"), "effective_batch_size 32 -> 16"),
    ],
)
def test_a_setting_that_decides_the_weights_cannot_change(copy, catalogue, capsys, changed, said):
    before = (copy / NAME).read_bytes()
    assert run(command(catalogue, copy, *changed)) == 2
    assert said in one_error(capsys)[0]
    assert (copy / NAME).read_bytes() == before


def test_another_base_model_is_refused_with_both_fingerprints(copy, capsys):
    path = copy / NAME
    content = load_checkpoint(path)
    content["base_model"]["fingerprint"] = "0123456789abcdef"
    content["finished"] = False
    torch.save({**content, "format_version": 1}, path)
    assert run(["resume", str(copy / "dual_lora")]) == 2
    assert "(01234567) instead of tiny (" in one_error(capsys)[0]
