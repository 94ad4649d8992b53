"""``best.pt`` damaged or gone: what the checkpoint has is restored, the rest is reported."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from clipft.runs.checkpoint import load_checkpoint
from tests.e2e.test_train import assert_same_run, weights
from tests.faults.helpers import lines
from tests.faults.outside import command, steps, wait_until
from tests.faults.test_checkpoint_faults import cut, empty, flip

HARM = pytest.mark.parametrize("harm", [flip, cut, empty, Path.unlink], ids=lambda h: h.__name__)


def environ(whole: Path) -> dict[str, str | None]:
    return {"CLIPFT_CACHE": str(whole / "cache")}


@pytest.mark.slow
@HARM
def test_weights_of_the_checkpoints_epoch_are_rewritten(programs, whole, tmp_path, harm):
    """The run was killed while finishing, and its last epoch was the best one."""
    out = tmp_path / "runs"
    shutil.copytree(whole / "runs", out)
    (out / "dual_lora" / "result.json").unlink()
    harm(out / "dual_lora" / "best.pt")
    run = programs.run("resume", str(out / "dual_lora"), env=environ(whole))
    assert run.wait() == 0, run.err
    assert "best.pt was restored from the checkpoint." in run.err
    assert_same_run(whole / "runs", out)


@pytest.fixture(scope="module")
def first_best(programs, catalogue, whole, tmp_path_factory) -> Path:
    """A run that lacks only its result, and whose first of three epochs was the best."""
    out = tmp_path_factory.mktemp("first-best")
    run = programs.run(*command(catalogue, out, "--min-delta", "100"), env=environ(whole))
    assert run.wait() == 0, run.err
    result = out / "dual_lora" / "result.json"
    assert json.loads(result.read_text())["best_epoch"] == 1
    result.unlink()
    return out


def test_weights_of_an_earlier_epoch_are_lost_and_reported(programs, whole, first_best, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(first_best, out)
    best, checkpoint = out / "dual_lora" / "best.pt", out / "dual_lora_checkpoint.pt"
    flip(best)
    before, lost = checkpoint.read_bytes(), load_checkpoint(checkpoint)["best"]["epoch"]
    for _ in range(2):
        run = programs.run("resume", str(checkpoint), env=environ(whole))
        assert run.wait() == 5
        error, hint = run.error()
        assert f"{best} is damaged: its SHA-256 is not the one it was written with" in error
        assert error.endswith(f"the weights of epoch {lost}, the best one so far, are lost")
        assert "restore a copy of best.pt" in hint and "remove it" in hint
        assert checkpoint.read_bytes() == before

    best.unlink()  # as the hint says
    run = programs.run("resume", str(checkpoint), env=environ(whole))
    assert run.wait() == 0, run.err
    assert f"warning: {best} is gone: the weights of epoch {lost}" in run.err
    result = json.loads((out / "dual_lora" / "result.json").read_text())
    metrics = lines(out / "dual_lora" / "metrics.jsonl")
    last = [line for line in metrics if line["kind"] == "epoch"][-1]
    assert (result["best_epoch"], result["after"]) == (3, last["retrieval"])
    ours, theirs = weights(best), weights(checkpoint)
    assert all((ours[name] == weight).all() for name, weight in theirs.items())


@pytest.mark.slow
def test_in_mid_epoch_damage_is_found_before_training(programs, catalogue, whole, tmp_path):
    for attempt in range(5):
        out = tmp_path / str(attempt)
        run = programs.start(*command(catalogue, out), env=environ(whole))
        wait_until(lambda: steps(out) >= 5, run)  # noqa: B023
        run.signal(signal.SIGKILL)
        run.wait()
        if steps(out) % 3:
            break
    assert steps(out) % 3, "a kill in mid-epoch, in five attempts"
    best = out / "dual_lora" / "best.pt"
    empty(best)
    refused = programs.run("resume", str(out / "dual_lora"), env=environ(whole))
    assert refused.wait() == 5 and "best.pt is damaged" in refused.error()[0]
    best.unlink()
    end = programs.run("resume", str(out / "dual_lora"), env=environ(whole))
    assert end.wait() == 0 and "warning: " in end.err
    assert_same_run(whole / "runs", out)  # its best epoch was still to come
