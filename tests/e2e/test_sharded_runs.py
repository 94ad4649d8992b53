"""A run over sharded weights is the same run, from its settings to its end."""

import json
import signal
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from tests.conftest import write_shard
from tests.e2e.test_many_processes import (
    VICTIMS,
    arguments,
    assert_a_kill_is_said_and_the_state_whole,
    assert_same_figures,
    clipft,
    done,
    start,
    wait_for_step,
    workers,
)

MORE = ("--scenario", "full", "--max-bad", "0.2")
SHARDED = (*MORE, "--processes", "2", "--shard-weights")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """47 pairs, 3 of them bad: steps of 20, 20 and 7, uneven among processes."""
    folder = tmp_path_factory.mktemp("uneven")
    write_shard(folder / "train" / "00000.tar", range(47), bad=(4, 17, 40))
    write_shard(folder / "val" / "00000.tar", range(1000, 1021))
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert run(arguments(data, out, *MORE)) == 0
    return out


def evaluation(out: Path) -> dict:
    return json.loads((out / "full" / "evaluation.json").read_text())


def assert_same_end(one: Path, other: Path) -> None:
    assert_same_figures(one, other)
    ours, theirs = (evaluation(out)["after"]["paired"] for out in (one, other))
    assert ours == theirs
    for name in ("full_checkpoint.pt", "full/best.pt"):
        ours, theirs = (torch.load(out / name, weights_only=True) for out in (one, other))
        assert ours.keys() == theirs.keys()
        weights = ours["model_state_dict"]
        assert weights.keys() == theirs["model_state_dict"].keys()
        for key, weight in theirs["model_state_dict"].items():
            if not key.endswith("k_proj.bias"):  # its gradient is rounding, see test_sharding.py
                torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_whole_weights_and_one_process_goes_on(alone, data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *SHARDED)), tmp_path)
    wait_for_step(tmp_path, 2, process)
    workers(process)[1].send_signal(signal.SIGTERM)
    _, stderr = done(process, 75)
    assert stderr.count("error: stopped by SIGTERM after step") == 1
    assert run(["resume", "--output-dir", str(tmp_path), "--processes", "1"]) == 0
    assert_same_end(tmp_path, alone)


@pytest.mark.slow
def test_one_process_is_stopped_and_two_go_on_with_sharded_weights(alone, data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *MORE)), tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    done(process, 75)
    more = ("--processes", "2", "--shard-weights")
    done(start(clipft("resume", "--output-dir", str(tmp_path), *more), tmp_path))
    assert_same_end(tmp_path, alone)


@pytest.mark.slow
@VICTIMS
def test_one_is_killed_and_the_last_checkpoint_is_whole(data, tmp_path, victim):
    args = arguments(data, tmp_path, *SHARDED, "--epochs", "200")
    assert_a_kill_is_said_and_the_state_whole(args, tmp_path, victim)


@pytest.mark.slow
def test_a_plan_foresees_the_checkpoint_of_whole_weights(alone, data, tmp_path):
    process = start(clipft(*arguments(data, tmp_path, *SHARDED, "--plan", "--json")), tmp_path)
    stdout, _ = done(process)
    foreseen = json.loads(stdout)["forecast"]["checkpoint_bytes"]
    assert foreseen == pytest.approx((alone / "full_checkpoint.pt").stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--scenario", "dual_lora"), "--shard-weights needs scenario full"),
        (("--scenario", "full", "--optimizer", "adamw8bit"), "adamw8bit"),
    ],
    ids=["adapters", "adamw8bit"],
)
def test_what_cannot_be_sharded_is_refused(given, says, data, tmp_path, capsys):
    assert run(arguments(data, tmp_path, *given, "--shard-weights")) == 2
    assert says in capsys.readouterr().err


def test_one_process_says_that_there_is_nothing_to_share(data, tmp_path, capsys):
    assert run(arguments(data, tmp_path, *MORE, "--shard-weights", "--epochs", "1")) == 0
    assert "--shard-weights has no effect in a run of one process" in capsys.readouterr().err
