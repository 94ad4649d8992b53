"""``clipft train --plan``: what it foresees is what the run then does, and it leaves nothing."""

import json
from pathlib import Path

import pytest

from clipft.cli.app import run

SMALL = [
    *("--model", "tiny", "--epochs", "2", "--effective-batch-size", "32"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
    *("--device", "cpu", "--stop-on", "never", "--checkpoint-every", "2"),
]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def planned(capsys, *args: str) -> dict:
    capsys.readouterr()
    assert run(["train", *SMALL, *args, "--plan", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["forecast"]


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planned")
    args = ["--data-dir", str(catalogue), "--output-dir", str(out), "--json"]
    assert run(["train", *SMALL, *args]) == 0
    return out


def test_the_run_does_what_was_foreseen(catalogue, trained, tmp_path, capsys):
    out = tmp_path / "none"
    foreseen = planned(capsys, "--data-dir", str(catalogue), "--output-dir", str(out))
    assert not out.exists()
    plan = foreseen["plan"]
    result = json.loads((trained / "dual_lora" / "result.json").read_text())
    assert plan["epochs"] * plan["steps_per_epoch"] == result["steps"] == 6
    assert (plan["train_pairs"], plan["val_pairs"]) == (96, 40)
    assert foreseen["measured_steps"] == 6  # the run has no more
    assert foreseen["seconds"] > 6 * foreseen["seconds_per_step"] > 0
    assert 0 < foreseen["peak_bytes"] < foreseen["usable_bytes"]
    assert foreseen["saves"] == 5  # steps 2, 3, 4, 6 and the end
    for name, size in (("_checkpoint.pt", "checkpoint_bytes"), ("/best.pt", "best_bytes")):
        real = (trained / f"dual_lora{name}").stat().st_size
        assert foreseen[size] == pytest.approx(real, rel=0.02)  # settings and figures are more


def test_a_run_that_is_there_stays_as_it_is(catalogue, trained, capsys):
    before = content(trained)
    foreseen = planned(capsys, "--data-dir", str(catalogue), "--output-dir", str(trained))
    assert content(trained) == before
    assert foreseen["done_steps"] == 0


def test_what_a_resumed_run_has_left_is_foreseen(catalogue, trained, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(trained)]
    before = content(trained)
    foreseen = planned(capsys, *flags, "--resume-from-checkpoint")
    assert content(trained) == before
    assert foreseen["done_steps"] == 6
    assert foreseen["seconds"] == pytest.approx(2 * foreseen["validation_seconds"])


def test_people_read_it_too(catalogue, tmp_path, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "none")]
    assert run(["train", *SMALL, *flags, "--plan"]) == 0
    said = capsys.readouterr().out
    for words in (
        "2 epochs of 3 steps with 32 pairs each",
        "warm-up",
        "time",
        "memory",
        "disk",
        "uploads",
    ):
        assert words in said


def test_the_untouched_model_has_a_plan(catalogue, tmp_path, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "none")]
    foreseen = planned(capsys, *flags, "--scenario", "zero_shot")
    assert foreseen["measured_steps"] == foreseen["checkpoint_bytes"] == 0
    assert foreseen["validations"] == 2


def test_unusable_pairs_that_are_met_are_counted(tmp_path, capsys):
    from tests.conftest import write_shard

    write_shard(tmp_path / "data" / "train" / "0.tar", range(64), bad=[3, 5])
    write_shard(tmp_path / "data" / "val" / "0.tar", range(1000, 1020), bad=[1003])
    flags = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "none")]
    foreseen = planned(capsys, *flags, "--max-bad", "0.5", "--epochs", "1")
    assert foreseen["unusable"] == 3


def test_what_would_stop_the_run_stops_the_plan(tmp_path, capsys):
    assert run(["train", *SMALL, "--data-dir", str(tmp_path / "none"), "--plan"]) == 3
    assert "error: " in capsys.readouterr().err
