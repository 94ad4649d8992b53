"""Disks that are full, read-only or gone: the old state stays whole, and the error has the path."""

import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from clipft.runs.checkpoint import load_checkpoint
from tests.e2e.test_train import assert_same_run
from tests.faults.outside import command, steps, wait_until

CHECKPOINT = "dual_lora_checkpoint.pt"


@contextmanager
def disk(folder: Path, kib: int):
    """Mount a file system of ``kib`` KiB."""
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "clipft-test", str(folder)]
    if subprocess.run(made, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def room(folder: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True)


def cache(whole: Path) -> dict[str, str | None]:
    return {"CLIPFT_CACHE": str(whole / "cache")}


@pytest.mark.parametrize(
    "kib",
    [
        pytest.param(size, marks=[] if size == 1800 else [pytest.mark.slow])
        for size in (300, 700, 1100, 1400, 1800, 2100, 2500, 2900, 3100, 3250)
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_state_and_resumes_with_room(
    programs,
    catalogue,
    whole,
    tmp_path,
    kib,
):
    """The sizes make it fail in the first checkpoint, in a later one, in best.pt, in a line of the
    metrics, in the adapter, and in the evaluation."""
    with disk(tmp_path / "disk", kib) as out:
        full = programs.run(*command(catalogue, out), env=cache(whole))
        assert full.wait() == 4, full.err
        error, hint = full.error()
        assert str(out) in error and "No space left on device" in error
        assert "free some space" in hint
        if "_checkpoint.pt" in error:
            assert "bytes were needed" in error
        assert not list(out.rglob("*.part"))
        if (out / CHECKPOINT).exists():
            load_checkpoint(out / CHECKPOINT)
        room(out, 20_000)
        again = programs.run(*command(catalogue, out), env=cache(whole))
        assert again.wait() == 0, again.err
        assert_same_run(whole / "runs", out)


def test_another_program_fills_the_disk(programs, catalogue, whole, tmp_path):
    with disk(tmp_path / "disk", 20_000) as out:
        run = programs.start(*command(catalogue, out, "--epochs", "300"), env=cache(whole))
        wait_until(lambda: steps(out) >= 2, run)
        with suppress(OSError), (out / "theirs").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        assert run.wait() == 4
        assert str(out) in run.error()[0]
        load_checkpoint(out / CHECKPOINT)


def test_a_read_only_folder_is_found_before_any_work(programs, catalogue, tmp_path):
    with disk(tmp_path / "disk", 1000) as out:
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        run = programs.run(*command(catalogue, out / "runs"))
        assert run.wait() == 4
        error, hint = run.error()
        assert str(out / "runs") in error and "Read-only file system" in error
        assert "--output-dir" in hint
        assert "pretrained: val loss" not in run.err  # nothing was measured yet


def test_a_folder_that_is_moved_while_training(programs, catalogue, whole, tmp_path):
    """Another program moves the folder: the run ends with exit code 4 at its next write."""
    out = tmp_path / "runs"
    run = programs.start(*command(catalogue, out, "--epochs", "300"), env=cache(whole))
    wait_until(lambda: steps(out) >= 2, run)
    os.rename(out, tmp_path / "moved")
    out.write_text("a file in its place")
    assert run.wait() == 4, run.err
    assert str(out) in run.error()[0]
    load_checkpoint(tmp_path / "moved" / CHECKPOINT)
