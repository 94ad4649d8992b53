"""The environment of the program: network, home, clock, terminal, folder names, permissions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipft.cli.app import run
from tests import warm
from tests.e2e.test_train import assert_same_run
from tests.faults.helpers import one_error
from tests.faults.outside import ROOT, command, steps, wait_until
from tests.tiny_run import TINY


def installed(*args: str, **more) -> "subprocess.CompletedProcess[bytes]":
    """Run ``clipft`` in a process of its own."""
    return warm.run([sys.executable, "-m", "clipft", *args], stderr=subprocess.PIPE, **more)


@pytest.mark.slow
def test_no_network_and_no_cached_model(programs, catalogue, tmp_path):
    """The hub cannot be reached, and the cache is empty."""
    env = {"HF_HUB_OFFLINE": None, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://[::1]:9"}
    began = time.monotonic()
    run = programs.run(
        *("train", "--model", "openai/clip-vit-base-patch32", "--data-dir", str(catalogue)),
        *("--output-dir", str(tmp_path / "out")),
        env=env,
    )
    assert run.wait() == 5
    assert time.monotonic() - began < 60
    error, hint = run.error()
    assert "openai/clip-vit-base-patch32" in error and "\n" not in error
    assert "local folder" in hint


def test_a_gpu_that_is_not_there(programs, catalogue, tmp_path):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    run = programs.run("train", *TINY, "--device", "cuda", *where, env={"CUDA_VISIBLE_DEVICES": ""})
    assert run.wait() == 2
    error, hint = run.error()
    assert "cuda" in error and "--device" in error + hint


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CLIPFT_EPOCH", "3", "CLIPFT_EPOCHS"),
        ("CLIPFT_LR", "fast", "CLIPFT_LR"),
        ("CLIPFT_LORA_DROPOUT", "1.5", "less than 1"),
    ],
)
def test_mistakes_in_the_environment_are_named(monkeypatch, capsys, name, value, said):
    monkeypatch.setenv(name, value)
    assert run(["train"]) == 2
    error, hint = one_error(capsys)
    assert name in error and said in error + hint


def test_folder_names_with_spaces_and_other_scripts(programs, catalogue, tmp_path):
    """In the C locale, with relative paths, from a working folder of such a name."""
    place = tmp_path / "Möbel & 椅子 'neu' \u2028x"
    shutil.copytree(catalogue, place / "dätä")
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": None, "PYTHONIOENCODING": None}
    args = ["train", *TINY, "--data-dir", "dätä", "--output-dir", "Läufe 1", "--json"]
    run = programs.run(*args, env=env, cwd=place)
    assert run.wait() == 0, run.err
    assert json.loads(run.out)["checkpoint"] == "Läufe 1/dual_lora_checkpoint.pt"
    assert (place / "Läufe 1" / "dual_lora" / "report.html").exists()
    again = programs.run("resume", "Läufe 1/dual_lora", env=env, cwd=place)
    assert again.wait() == 0 and "finished" in again.err


def test_a_umask_of_077_and_a_read_only_home(programs, catalogue, tmp_path):
    home = tmp_path / "home"
    home.write_text("no folder: nothing can be made in it")
    env: dict[str, str | None] = {"HOME": str(home), "XDG_CACHE_HOME": None, "CLIPFT_CACHE": None}
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    run = programs.run("train", *TINY, *where, env=env, umask=0o077)
    assert run.wait() == 0, run.err
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert made and all(path.stat().st_mode & 0o077 == 0 for path in made)


@pytest.mark.slow
def test_a_clock_that_is_set_back_while_training(catalogue, tmp_path, programs, whole):
    """The clock jumps back an hour in the middle of the run, set by libfaketime."""
    library = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime")
    stamp = tmp_path / "clock"
    stamp.write_text("+0")
    env = {**os.environ, "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(stamp)}
    env |= {"FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
    args = [sys.executable, "-m", "clipft", *command(catalogue, tmp_path / "out")]
    run = subprocess.Popen(args, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while steps(tmp_path / "out") < 3:
        assert run.poll() is None
        time.sleep(0.01)
    stamp.write_text("-1h")
    assert run.wait(60) == 0
    assert_same_run(whole / "runs", tmp_path / "out")


@pytest.mark.slow
def test_a_checkpoint_from_the_future_is_resumed(programs, catalogue, whole, tmp_path):
    """A clock that was set back leaves files with times in the future."""
    out, env = tmp_path / "out", {"CLIPFT_CACHE": str(whole / "cache")}
    run = programs.start(*command(catalogue, out), env=env)
    wait_until(lambda: steps(out) >= 4, run)
    run.signal(signal.SIGKILL)
    run.wait()
    later = time.time() + 3600
    for path in out.rglob("*"):
        os.utime(path, (later, later))
    assert programs.run(*command(catalogue, out), env=env).wait() == 0
    assert_same_run(whole / "runs", out)


@pytest.mark.slow
def test_a_run_survives_a_closed_stdout(programs, catalogue, whole, tmp_path):
    """``clipft train | head -1``: the run goes to its end without an error."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = installed(
            *command(catalogue, tmp_path),
            stdout=writing,
            env={**os.environ, "CLIPFT_CACHE": str(whole / "cache")},
        )
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr and b"rror" not in done.stderr, done.stderr
    assert_same_run(whole / "runs", tmp_path)


@pytest.mark.slow
def test_a_run_survives_a_closed_stderr(catalogue, whole, tmp_path):
    """``clipft train 2>&1 | head -1``"""
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "CLIPFT_CACHE": str(whole / "cache")}
    args = [sys.executable, "-m", "clipft", *command(catalogue, tmp_path)]
    try:
        done = warm.run(args, stdout=writing, stderr=writing, env=env)
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert_same_run(whole / "runs", tmp_path)


def test_without_a_terminal_lines_fit_40_columns(programs, catalogue, tmp_path):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    env: dict[str, str | None] = {"NO_COLOR": "1", "COLUMNS": "40", "TERM": "dumb"}
    run = programs.run("train", *TINY, *where, env=env)
    assert run.wait() == 0
    assert "\x1b" not in run.out + run.err and "\r" not in run.err
    assert max(map(len, run.out.splitlines())) <= 40


def test_a_second_run_in_a_folder_names_the_first(programs, catalogue, whole, tmp_path):
    env = {"CLIPFT_CACHE": str(whole / "cache")}
    first = programs.start(*command(catalogue, tmp_path, "--epochs", "300"), env=env)
    wait_until(lambda: steps(tmp_path) >= 1, first)
    second = programs.run(*command(catalogue, tmp_path), env=env)
    assert second.wait() == 2
    assert f"process {first.pid}, started {time.strftime('%Y')}-" in second.error()[0]
    first.signal(signal.SIGKILL)
    first.wait()
    third = programs.run(*command(catalogue, tmp_path, "--epochs", "300", "--lr", "1"), env=env)
    assert third.wait() == 2 and "lr 0.004 -> 1" in third.error()[0]  # the lock is gone
