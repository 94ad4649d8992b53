"""Signals during validation, feature computation or evaluation take effect between batches."""

import json
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from clipft.runs.checkpoint import load_checkpoint
from tests.e2e.test_many_processes import assert_same_figures
from tests.e2e.test_train import assert_same_run
from tests.faults.helpers import encoded, good, lines, write_tar
from tests.faults.outside import Program, steps, wait_until

CHECKPOINT = "dual_lora_checkpoint.pt"
ARGS = [
    *("--model", "tiny", "--epochs", "2", "--effective-batch-size", "4", "--device", "cpu"),
    *("--micro-batch-size", "2", "--num-workers", "0", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "0", "--resume-from-checkpoint"),
]
PAIRS = 12


@pytest.fixture(scope="module")
def slow_validation(tmp_path_factory) -> Path:
    """Two steps per epoch; validation images that take long to decode, two per batch."""
    folder = tmp_path_factory.mktemp("slow-validation")
    large = encoded(Image.linear_gradient("L").resize((2000, 2000)).convert("RGB"), "PNG")
    val = [(n, large if n.endswith("jpg") else d) for n, d in good(range(100, 100 + PAIRS))]
    write_tar(folder / "train" / "00000.tar", good(range(8)))
    write_tar(folder / "val" / "00000.tar", val)
    return folder


def start(programs, data: Path, out: Path, *more: str) -> Program:
    where = ["--data-dir", str(data), "--output-dir", str(out)]
    return programs.start("train", *ARGS, *where, *more)


@pytest.fixture(scope="module")
def undisturbed(programs, slow_validation, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run = start(programs, slow_validation, out)
    assert run.wait() == 0, run.err
    return out


def epochs(out: Path) -> list[int]:
    metrics = lines(out / "dual_lora" / "metrics.jsonl")
    return [line["epoch"] for line in metrics if line["kind"] == "epoch"]


def stop(run: Program, number: int = signal.SIGTERM) -> tuple[str, str]:
    """Send a signal; return the error and hint of the run, which must exit with 75."""
    run.signal(number)
    assert run.wait(25) == 75, run.err
    return run.error()


@pytest.mark.slow
def test_before_the_first_step(programs, slow_validation, undisturbed, tmp_path):
    run = start(programs, slow_validation, tmp_path)
    wait_until(lambda: (tmp_path / "dual_lora" / "run.json").exists(), run)
    error, hint = stop(run)
    assert error == "stopped by SIGTERM before the first step; nothing was trained yet"
    assert hint == "run the same command again"
    assert not list(tmp_path.glob("*.pt")) and epochs(tmp_path) == []
    assert start(programs, slow_validation, tmp_path).wait() == 0
    assert_same_run(undisturbed, tmp_path)


def cut_off(programs, data: Path, out: Path) -> None:
    """Stop a run during the validation of its first epoch."""
    run = start(programs, data, out)
    wait_until(lambda: steps(out) == 2, run)
    error, hint = stop(run)
    assert error.startswith("stopped by SIGTERM after step 2; the state is saved in ")
    assert hint == f"continue with `clipft resume {out / CHECKPOINT}`"
    assert epochs(out) == [0]
    saved = load_checkpoint(out / CHECKPOINT)
    assert (saved["step"], saved["epoch"], saved["validated"]) == (2, 1, False)


@pytest.mark.slow
def test_in_the_validation_after_an_epoch(programs, slow_validation, undisturbed, tmp_path):
    """Stopped again while that validation is repeated, the run still ends as an undisturbed one."""
    cut_off(programs, slow_validation, tmp_path)
    again = start(programs, slow_validation, tmp_path)
    wait_until(lambda: again.err_path.exists() and "Resuming after step 2" in again.err, again)
    assert "after step 2; the state is saved" in stop(again, signal.SIGINT)[0]
    assert epochs(tmp_path) == [0]
    end = programs.run("resume", str(tmp_path / CHECKPOINT))
    assert end.wait() == 0, end.err
    assert epochs(tmp_path) == [0, 1, 2]
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
def test_a_kill_after_the_repeated_validation_does_not_record_it_twice(
    programs, slow_validation, undisturbed, tmp_path
):
    """The metrics have the epoch's line already, the checkpoint does not know of it."""
    cut_off(programs, slow_validation, tmp_path)
    run = start(programs, slow_validation, tmp_path)
    checkpoint, before = tmp_path / CHECKPOINT, (tmp_path / CHECKPOINT).read_bytes()
    wait_until(lambda: epochs(tmp_path) == [0, 1], run)
    run.signal(signal.SIGKILL)
    run.wait()
    checkpoint.write_bytes(before)  # as if the kill had come before its rename
    end = programs.run("resume", str(checkpoint))
    assert end.wait() == 0, end.err
    assert epochs(tmp_path) == [0, 1, 2]
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
def test_in_the_evaluation_at_the_end(programs, slow_validation, undisturbed, tmp_path):
    run, folder = start(programs, slow_validation, tmp_path), tmp_path / "dual_lora"
    wait_until((folder / "adapter").exists, run)
    error, hint = stop(run)
    assert "after the last step, while the result was evaluated; the state is saved" in error
    assert "clipft resume" in hint and not (folder / "result.json").exists()
    end = programs.run("resume", str(tmp_path / CHECKPOINT))
    assert end.wait() == 0, end.err
    assert_same_run(undisturbed, tmp_path)
    ours, theirs = (
        json.loads((out / "dual_lora" / "evaluation.json").read_text())
        for out in (tmp_path, undisturbed)
    )
    assert ours == theirs


@pytest.mark.slow
def test_while_features_are_computed(programs, slow_validation, tmp_path):
    """The features of a frozen tower are in the cache completely or not at all."""
    cache = tmp_path / "cache"
    data = tmp_path / "data"
    for side in ("train", "val"):
        (data / side).mkdir(parents=True)
        (data / side / "00000.tar").symlink_to(slow_validation / "val" / "00000.tar")
    where = ["--data-dir", str(data), "--output-dir", str(tmp_path / "out")]
    args = ["train", *ARGS, *where, "--scenario", "text_lora"]
    run = programs.start(*args, env={"CLIPFT_CACHE": str(cache)})
    wait_until(lambda: any(cache.glob("features/.images-*")), run)
    error, _ = stop(run)
    assert error.endswith("before the first step of this start; nothing was trained yet")
    assert not any(cache.glob("features/.*")), "an unfinished folder was left"


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_during_validation_stops_both(
    programs, slow_validation, undisturbed, tmp_path
):
    import psutil

    run = start(programs, slow_validation, tmp_path, "--processes", "2")
    wait_until(lambda: steps(tmp_path) == 2, run, 120)
    children = psutil.Process(run.pid).children()
    (second,) = [child for child in children if child.name() == "rank-1"]
    began = time.monotonic()
    second.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75, run.err
    assert time.monotonic() - began < 25
    assert "stopped by SIGTERM after step 2" in run.error()[0]
    assert not load_checkpoint(tmp_path / CHECKPOINT)["validated"]
    end = programs.run("resume", str(tmp_path / CHECKPOINT), "--processes", "1")
    assert end.wait() == 0, end.err
    assert_same_figures(tmp_path, undisturbed)
