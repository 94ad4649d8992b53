"""A checkpoint is written while training goes on, and holds the state of its own step."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from clipft.core.errors import StorageError
from clipft.runs.checkpoint import load_checkpoint
from clipft.training import checkpointing
from clipft.training import run as training_run
from tests.conftest import write_shard

NAME = "dual_lora_checkpoint.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train" / "00000.tar", range(24))
    write_shard(folder / "val" / "00000.tar", range(1000, 1008))
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    """Train an epoch of six steps, with a save after every second one."""
    places = ("--data-dir", str(data), "--output-dir", str(out))
    size = ("--effective-batch-size", "4", "--epochs", "1", "--num-workers", "0")
    fixed = ("--model", "tiny", "--device", "cpu", "--stop-on", "never")
    return run(["train", *fixed, *places, *size, "--checkpoint-every", "2", *more])


def when_step_is(step: int, act, monkeypatch) -> None:
    """Call ``act`` between that step and the next one."""
    all_batches = training_run.step_batches

    def some(setup, state, *given):
        for batch in all_batches(setup, state, *given):
            if state.step == step:
                act()
            yield batch

    monkeypatch.setattr(training_run, "step_batches", some)


def write_with(before, monkeypatch) -> None:
    """Call ``before`` with the step of each checkpoint before it is written."""
    real = checkpointing.save_newest

    def save(path, content):
        before(content["step"])
        real(path, content)
        shutil.copy(path, path.with_name(f"step-{content['step']}.pt"))

    monkeypatch.setattr(checkpointing, "save_newest", save)


def test_steps_during_a_save_do_not_change_what_is_saved(data, tmp_path, monkeypatch):
    another_step = threading.Event()

    def hold(step: int) -> None:
        if step == 2:
            assert another_step.wait(30), "training waited for the file"

    with monkeypatch.context() as patch:
        when_step_is(3, another_step.set, patch)
        write_with(hold, patch)
        assert train(data, tmp_path / "held") == 0
    with monkeypatch.context() as patch:
        write_with(lambda step: None, patch)
        patch.setattr(checkpointing, "_copy_optimizer_state", lambda content: False)
        assert train(data, tmp_path / "waited") == 0
    for step in (2, 4, 6):
        held, waited = (
            load_checkpoint(tmp_path / out / f"step-{step}.pt") for out in ("held", "waited")
        )
        for name, weight in waited["model_state_dict"].items():
            assert torch.equal(held["model_state_dict"][name], weight)
        for number, state in waited["optimizer_state_dict"]["state"].items():
            for name, value in state.items():
                assert torch.equal(held["optimizer_state_dict"]["state"][number][name], value)
        assert held["scheduler_state_dict"] == waited["scheduler_state_dict"]


def fail_from(failing: int):
    def fail(step: int) -> None:
        if step >= failing:
            raise StorageError("cannot write the checkpoint: the disk is full", "free some space")

    return fail


def test_an_error_of_writing_ends_the_run_at_the_next_save(data, tmp_path, monkeypatch, capsys):
    write_with(fail_from(4), monkeypatch)
    assert train(data, tmp_path) == 4
    assert "the disk is full" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / NAME)["step"] == 2


def test_a_signal_waits_until_the_last_save_is_written(data, tmp_path, monkeypatch):
    when_step_is(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    write_with(lambda step: time.sleep(0.3), monkeypatch)
    assert train(data, tmp_path) == 75
    assert load_checkpoint(tmp_path / NAME)["step"] >= 2


def test_a_signal_does_not_hide_that_the_last_save_failed(data, tmp_path, monkeypatch, capsys):
    when_step_is(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    write_with(fail_from(2), monkeypatch)
    assert train(data, tmp_path) == 4
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / NAME).exists()


def test_another_error_comes_before_that_of_a_save(data, tmp_path, monkeypatch, capsys):
    def diverge() -> None:
        raise training_run.DivergedError("the loss is not finite", "lower --lr")

    when_step_is(2, diverge, monkeypatch)
    write_with(fail_from(2), monkeypatch)
    assert train(data, tmp_path) not in (0, 4)
    assert "the loss is not finite" in capsys.readouterr().err
