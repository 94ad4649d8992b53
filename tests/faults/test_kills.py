"""After a kill, the resumed run ends exactly as the run that was never killed."""

import random
import signal
import time
from pathlib import Path

import pytest

from clipft.runs.checkpoint import load_checkpoint
from tests.e2e.test_train import assert_same_run
from tests.faults.helpers import lines
from tests.faults.outside import Program, command, steps, wait_until


def no_rests(out: Path) -> None:
    assert not list(out.rglob("*.part"))
    assert not list(out.rglob("*.damaged.pt"))


def killed_at_random(programs, catalogue, whole: Path, out: Path, draw: random.Random) -> int:
    """Kill a run at random moments and resume it, until it ends; return the number of kills."""
    env, length = {"CLIPFT_CACHE": str(whole / "cache")}, float((whole / "seconds").read_text())
    kills = 0
    while True:
        run = programs.start(*command(catalogue, out), env=env)
        time.sleep(draw.uniform(0.05, length))
        run.signal(signal.SIGKILL)  # not yet waited for: its number is its own, ended or not
        if (code := run.wait()) == 0:
            return kills
        assert code == -signal.SIGKILL, run.err
        kills += 1


@pytest.mark.parametrize("wanted", [2, pytest.param(50, marks=pytest.mark.slow)], ids=str)
def test_kill_9_at_any_moment_loses_nothing(programs, catalogue, whole, tmp_path, wanted):
    """With -s the seed is printed, which repeats the kills as far as timing allows."""
    seed = random.randrange(2**32)
    draw, kills, runs = random.Random(seed), 0, 0
    while kills < wanted:
        out = tmp_path / str(runs)
        kills += killed_at_random(programs, catalogue, whole, out, draw)
        assert_same_run(whole / "runs", out)
        no_rests(out)
        runs += 1
    print(f"seed {seed}: {kills} kills in {runs} runs, all ended as the run that was not killed")


@pytest.mark.slow
def test_five_kills_in_one_epoch(programs, catalogue, whole, tmp_path):
    """A run that was resumed once must be able to resume again."""
    env = {"CLIPFT_CACHE": str(whole / "cache")}
    for done in (1, 1, 2, 2, 2):
        run = programs.start(*command(catalogue, tmp_path), env=env)
        wait_until(lambda: steps(tmp_path) >= done, run)  # noqa: B023
        run.signal(signal.SIGKILL)
        run.wait()
    assert programs.run(*command(catalogue, tmp_path), env=env).wait() == 0
    assert_same_run(whole / "runs", tmp_path)


@pytest.mark.slow
def test_five_kills_in_mid_accumulation_with_other_numbers_of_workers(
    programs, catalogue, tmp_path
):
    """Kills between the micro-batches of a step, alternating four workers and one."""
    small = ("--micro-batch-size", "1", "--checkpoint-every", "1", "--epochs", "1")
    alone = programs.run(*command(catalogue, tmp_path / "alone", *small))
    assert alone.wait() == 0, alone.err
    out, half = tmp_path / "killed", seconds_of_a_step(tmp_path / "alone") / 2
    for done, workers in ((0, 4), (0, 1), (1, 4), (1, 1), (2, 4)):
        run = programs.start(*command(catalogue, out, *small, "--num-workers", str(workers)))
        wait_until(lambda: run.err_path.exists() and began(run.err), run)  # noqa: B023
        wait_until(lambda: steps(out) >= done, run)  # noqa: B023
        time.sleep(half)  # of 32 micro-batches, which take nearly all of it
        run.signal(signal.SIGKILL)
        run.wait()
    end = programs.run(*command(catalogue, tmp_path / "killed", *small, "--num-workers", "1"))
    assert end.wait() == 0, end.err
    assert_same_run(tmp_path / "alone", tmp_path / "killed")
    assert pairs(tmp_path / "killed") == pairs(tmp_path / "alone") == [32, 32, 32]


def began(said: str) -> bool:
    return "pretrained: val loss" in said or "Resuming after step" in said


def step_lines(out: Path) -> list[dict]:
    metrics = lines(out / "dual_lora" / "metrics.jsonl")
    return [line for line in metrics if line["kind"] == "step"]


def seconds_of_a_step(out: Path) -> float:
    return min(line["seconds"] for line in step_lines(out))


def pairs(out: Path) -> list[int]:
    return [line["pairs"] for line in step_lines(out)]


def test_a_killed_run_can_be_resumed_at_once(programs, catalogue, whole, tmp_path):
    """Its decoding processes live on for seconds, and must not hold the lock of the run."""
    env = {"CLIPFT_CACHE": str(whole / "cache")}
    run = programs.start(*command(catalogue, tmp_path, "--num-workers", "1"), env=env)
    wait_until(lambda: steps(tmp_path) >= 1, run)
    run.signal(signal.SIGKILL)
    run.wait()
    again = programs.run(*command(catalogue, tmp_path), env=env)
    assert again.wait() == 0, again.err
    assert_same_run(whole / "runs", tmp_path)


PHASES = [
    pytest.param(
        phase, number, marks=[] if quick else [pytest.mark.slow], id=f"{phase}-{number.name}"
    )
    for phase, number, quick in (
        ("loading", signal.SIGTERM, True),
        ("loading", signal.SIGINT, False),
        ("measuring", signal.SIGTERM, False),
        ("measuring", signal.SIGINT, False),
        ("training", signal.SIGINT, False),
        ("at the end", signal.SIGTERM, False),
        ("at the end", signal.SIGINT, False),
    )
]


@pytest.mark.parametrize(("phase", "number"), PHASES)
def test_a_signal_in_any_phase_ends_within_25_seconds(
    programs, catalogue, whole, tmp_path, phase, number
):
    """The exit code is 75 if a step was done and its state saved."""
    run = programs.start(*command(catalogue, tmp_path), env={"CLIPFT_CACHE": str(whole / "cache")})
    until(phase, tmp_path, run)
    run.signal(number)
    began = time.monotonic()
    code = run.wait()
    assert time.monotonic() - began < 25
    assert "Traceback" not in run.err
    checkpoint = tmp_path / "dual_lora_checkpoint.pt"
    assert code in (0, 75, 130, 128 + number), run.err
    if code == 75:
        said = run.error()[0]
        assert f"stopped by {number.name}" in said
        assert "nothing was trained yet" in said or load_checkpoint(checkpoint)
    no_rests(tmp_path)
    end = programs.run(*command(catalogue, tmp_path), env={"CLIPFT_CACHE": str(whole / "cache")})
    assert end.wait() == 0, end.err
    assert_same_run(whole / "runs", tmp_path)


def until(phase: str, out: Path, run: Program) -> None:
    folder = out / "dual_lora"
    conditions = {
        "loading": lambda: (folder / ".lock").exists(),
        "measuring": lambda: (folder / "settings.toml").exists(),
        "training": lambda: steps(out) >= 4,
        "at the end": lambda: steps(out) >= 9,
    }
    wait_until(conditions[phase], run)


def test_a_second_sigint_stops_at_once_with_the_last_checkpoint_whole(
    programs, catalogue, whole, tmp_path
):
    env = {"CLIPFT_CACHE": str(whole / "cache")}
    run = programs.start(*command(catalogue, tmp_path), env=env)
    wait_until(lambda: steps(tmp_path) >= 2, run)
    run.signal(signal.SIGINT)
    run.signal(signal.SIGINT)
    assert run.wait(10) in (75, 130), run.err  # 75: the first was heard before the second
    assert "Traceback" not in run.err
    assert load_checkpoint(tmp_path / "dual_lora_checkpoint.pt")["step"] >= 1
    assert programs.run(*command(catalogue, tmp_path), env=env).wait() == 0
    assert_same_run(whole / "runs", tmp_path)
