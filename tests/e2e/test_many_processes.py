"""Several processes are one run: the same figures, one voice, and no waiting for the dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from clipft.cli.app import run
from tests import warm
from tests.conftest import write_shard
from tests.training.process_helpers import free_port, torchrun_environment

SMALL = [
    *("--model", "tiny", "--epochs", "2", "--effective-batch-size", "20"),
    *("--micro-batch-size", "5", "--num-workers", "0", "--precision", "fp32", "--device", "cpu"),
    *("--stop-on", "never", "--checkpoint-every", "1", "--lora-dropout", "0.1"),
]


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", *SMALL, "--data-dir", str(data), "--output-dir", str(out), *more]


def start(command: list[str], out: Path, **environment: str) -> warm.Popen:
    out.mkdir(parents=True, exist_ok=True)
    return warm.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "CLIPFT_CACHE": str(out / "cache"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def clipft(*args: str) -> list[str]:
    return [sys.executable, "-m", "clipft", *args]


def done(process: warm.Popen, code: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


TIMES = ("seconds", "data_seconds", "pairs_per_s")


def figures(out: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl but for what a clock says."""
    (metrics,) = out.glob("*/metrics.jsonl")
    lines = metrics.read_text().splitlines()
    return [flat({k: v for k, v in json.loads(line).items() if k not in TIMES}) for line in lines]


def flat(record: dict[str, object]) -> dict[str, object]:
    found = {}
    for name, value in record.items():
        inner = flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{key}": v for key, v in inner.items()}
    return found


def assert_same_figures(one: Path, other: Path) -> None:
    ours, theirs = figures(one), figures(other)
    assert len(ours) == len(theirs) and ours
    for a, b in zip(ours, theirs, strict=True):
        numbers = {name for name, value in b.items() if isinstance(value, float)}
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=1e-5)
        assert {k: a[k] for k in a.keys() - numbers} == {k: b[k] for k in b.keys() - numbers}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """47 pairs, 3 of them bad: steps of 20, 20 and 7, uneven among processes."""
    folder = tmp_path_factory.mktemp("uneven")
    write_shard(folder / "train" / "00000.tar", range(30), bad=(4, 17))
    write_shard(folder / "train" / "00001.tar", range(30, 47), bad=(40,))
    write_shard(folder / "val" / "00000.tar", range(1000, 1021))
    return folder


MORE = ("--max-bad", "0.2")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert run(arguments(data, out, *MORE)) == 0
    return out


def skipped(out: Path) -> list[tuple[str, str]]:
    lines = (out / "dual_lora" / "skipped.jsonl").read_text().splitlines()
    return [(json.loads(line)["key"], json.loads(line)["step"]) for line in lines]


@pytest.mark.slow
def test_the_same_run_by_clipfts_launcher(alone, data, tmp_path):
    args = arguments(data, tmp_path, *MORE, "--processes", "2", "--json")
    stdout, stderr = done(start(clipft(*args), tmp_path))
    assert_same_figures(tmp_path, alone)
    assert skipped(tmp_path) == skipped(alone)
    assert json.loads(stdout)["skipped_pairs"] == 3  # one voice
    assert stderr.count("training pairs,") == 1 and "across 2 processes" in stderr
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["local", "exact"])
def test_groups_and_a_trained_temperature_are_the_same_too(accumulation, data, tmp_path):
    args = [*MORE, "--accumulation", accumulation, "--positives", "group"]
    args += ["--group-field", "type", "--logit-scale", "trained", "--lr-scale", "0.01"]
    args += ["--lora-dropout", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(arguments(data, one, *args)) == 0
    done(start(clipft(*arguments(data, two, *args, "--processes", "2")), two))
    assert_same_figures(two, one)
    assert any("loss_floor." in line for line in figures(one))


@pytest.mark.slow
def test_the_same_run_by_torchrun_with_more_processes_than_some_steps_have_batches(
    alone, data, tmp_path
):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "clipft"]
    # 20 pairs among 3 are micro-batches of 4; dropout follows the micro-batches
    args = [*MORE, "--lora-dropout", "0", "--micro-batch-size", "4"]
    one, three = tmp_path / "one", tmp_path / "three"
    assert run(arguments(data, one, *args)) == 0
    done(start([*launcher, *arguments(data, three, *args)], three))
    assert_same_figures(three, one)


@pytest.mark.slow
def test_the_same_run_under_slurm(alone, data, tmp_path):
    job = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(free_port()),
        "MASTER_PORT": str(free_port()),
    }
    command = clipft(*arguments(data, tmp_path, *MORE))
    tasks = [
        start(command, tmp_path, **job, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"
    ]
    said = [done(task) for task in tasks]
    assert_same_figures(tmp_path, alone)
    assert said[1] == ("", "")


def test_sigterm_to_one_of_two_stops_both_after_a_step_and_one_alone_resumes(alone, data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *MORE, "--processes", "2")), tmp_path)
    wait_for_step(tmp_path, 2, process)
    workers(process)[1].send_signal(signal.SIGTERM)
    _, stderr = done(process, 75)
    assert stderr.count("error: stopped by SIGTERM after step") == 1
    assert stderr.count("hint: continue with `clipft resume") == 1
    saved = torch.load(tmp_path / "dual_lora_checkpoint.pt", weights_only=True)
    assert saved["step"] == figures(tmp_path)[-1]["step."]
    assert run(["resume", "--output-dir", str(tmp_path), "--processes", "1"]) == 0
    assert_same_figures(tmp_path, alone)


@pytest.mark.slow
def test_one_is_stopped_and_two_resume(alone, data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *MORE)), tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    done(process, 75)
    done(start(clipft("resume", "--output-dir", str(tmp_path), "--processes", "2"), tmp_path))
    assert_same_figures(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all(data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *LONG, "--processes", "2")), tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = done(process, 75)
    assert stderr.count("error: stopped by SIGTERM after step") == 1


def wait_for_step(out: Path, step: int, process: warm.Popen) -> None:
    limit = time.monotonic() + 200
    while time.monotonic() < limit and process.poll() is None:
        if any(f'"step": {step},' in path.read_text() for path in out.glob("*/metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came: {process.communicate()}")


LONG = ("--epochs", "200", *MORE)


def workers(launcher: warm.Popen) -> list[psutil.Process]:
    """The processes that train, by rank."""
    found = psutil.Process(launcher.pid).children()
    ranked = {child.name(): child for child in found if child.is_running()}
    return [ranked[name] for name in sorted(ranked) if name.startswith("rank-")]


def assert_a_kill_is_said_and_the_state_whole(args: list[str], out: Path, victim: int) -> None:
    """Of the run that ``args`` start, of two processes."""
    process = start(clipft(*args), out)
    wait_for_step(out, 4, process)
    killed = time.monotonic()
    workers(process)[victim].kill()
    _, stderr = done(process, 7)
    assert time.monotonic() - killed < 60
    assert f"error: process {victim} of 2 was killed by SIGKILL" in stderr
    assert stderr.count("error: ") == 1
    (checkpoint,) = out.glob("*_checkpoint.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] >= 3 and not saved["finished"]


VICTIMS = pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])


@VICTIMS
def test_one_is_killed_and_the_run_ends_with_the_state_whole(data, tmp_path, victim):
    args = arguments(data, tmp_path, *LONG, "--processes", "2")
    assert_a_kill_is_said_and_the_state_whole(args, tmp_path, victim)


@pytest.mark.slow
def test_under_torchruns_environment_the_survivor_says_so_and_saves(data, tmp_path):
    port = free_port()
    args = arguments(data, tmp_path, *LONG, "--checkpoint-every", "0")
    first, second = (
        start(clipft(*args), tmp_path, **torchrun_environment(rank, 2, port)) for rank in (0, 1)
    )
    wait_for_step(tmp_path, 2, first)  # of three: nothing is saved yet
    second.kill()
    second.communicate()
    _, stderr = done(first, 7)
    assert "error: another process of this run ended" in stderr
    saved = torch.load(tmp_path / "dual_lora_checkpoint.pt", weights_only=True)
    assert saved["step"] >= 2


@pytest.mark.slow
def test_they_end_when_their_launcher_is_killed(data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *LONG, "--processes", "2")), tmp_path)
    wait_for_step(tmp_path, 2, process)
    trained = workers(process)
    process.kill()
    _, alive = psutil.wait_procs(trained, timeout=60)
    for child in alive:
        child.kill()
    assert not alive


@pytest.mark.slow
def test_too_many_bad_pairs_over_all_stop_all(data, tmp_path):
    args = arguments(data, tmp_path, "--max-bad", "0.05", "--processes", "2")
    _, stderr = done(start(clipft(*args), tmp_path), 3)
    assert stderr.count("error: 3 pairs could not be used, more than --max-bad 0.05 of 47") == 1


@pytest.mark.slow
def test_an_error_before_the_start_is_said_once(data, tmp_path):
    nowhere = tmp_path / "nowhere"
    args = arguments(nowhere, tmp_path, "--processes", "2", "--json")
    stdout, stderr = done(start(clipft(*args), tmp_path), 3)
    assert stderr.count("error: no folder") == 1
    assert json.loads(stdout)["error"]["exit_code"] == 3


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_to_all(data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *LONG, "--processes", "2")), tmp_path)
    wait_for_step(tmp_path, 1, process)
    assert run(arguments(data, tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    done(process, 75)
