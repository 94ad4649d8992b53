"""``clipft train --plan`` predicts what the run then does, and leaves no files behind."""

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


def test_the_run_matches_its_plan(catalogue, trained, tmp_path, capsys):
    out = tmp_path / "none"
    forecast = planned(capsys, "--data-dir", str(catalogue), "--output-dir", str(out))
    assert not out.exists()
    plan = forecast["plan"]
    result = json.loads((trained / "dual_lora" / "result.json").read_text())
    assert plan["epochs"] * plan["steps_per_epoch"] == result["steps"] == 6
    assert (plan["train_pairs"], plan["val_pairs"]) == (96, 40)
    assert forecast["measured_steps"] == 6  # the run has no more
    assert forecast["seconds"] > 6 * forecast["seconds_per_step"] > 0
    assert 0 < forecast["peak_bytes"] < forecast["usable_bytes"]
    assert forecast["saves"] == 5  # steps 2, 3, 4, 6 and the end
    for name, size in (("_checkpoint.pt", "checkpoint_bytes"), ("/best.pt", "best_bytes")):
        real = (trained / f"dual_lora{name}").stat().st_size
        assert forecast[size] == pytest.approx(real, rel=0.02)  # settings and figures come on top


def test_a_plan_changes_nothing_in_an_existing_run(catalogue, trained, capsys):
    before = content(trained)
    forecast = planned(capsys, "--data-dir", str(catalogue), "--output-dir", str(trained))
    assert content(trained) == before
    assert forecast["done_steps"] == 0


def test_the_plan_of_a_resumed_run_covers_what_is_left(catalogue, trained, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(trained)]
    before = content(trained)
    forecast = planned(capsys, *flags, "--resume-from-checkpoint")
    assert content(trained) == before
    assert forecast["done_steps"] == 6
    assert forecast["seconds"] == pytest.approx(2 * forecast["validation_seconds"])


def test_the_plan_counts_the_searches_for_look_alikes(catalogue, tmp_path, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "none")]
    flags += ["--hard-negatives", "1", "--group-field", "type"]
    assert planned(capsys, *flags)["look_alike_searches"] == 0
    forecast = planned(capsys, *flags, "--hard-negatives-by", "current")
    assert forecast["look_alike_searches"] == 2 and forecast["look_alike_seconds"] > 0
    epochs = forecast["validations"] * forecast["validation_seconds"]
    epochs += 2 * forecast["look_alike_seconds"]
    assert forecast["seconds"] == pytest.approx(6 * forecast["seconds_per_step"] + epochs)


def test_the_plan_is_also_printed_as_text(catalogue, tmp_path, capsys):
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


def test_a_plan_says_what_the_features_of_frozen_towers_take(
    catalogue, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("clipft.embedding.feature_cache._SAMPLE", 64)
    flags = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "none")]
    flags += ["--scenario", "linear_probe", "--augmentation", "none"]
    forecast = planned(capsys, *flags)
    steps, each = 6 * forecast["seconds_per_step"], forecast["validation_seconds"]
    assert forecast["cache_bytes"] > 96 * 4 * 128
    assert forecast["seconds"] == pytest.approx(
        forecast["cache_seconds"] + steps + forecast["validations"] * each
    )
    assert run(["train", *SMALL, *flags, "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "features of frozen encoders in the cache folder" in said


def test_the_scenario_without_training_has_a_plan(catalogue, tmp_path, capsys):
    flags = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "none")]
    forecast = planned(capsys, *flags, "--scenario", "zero_shot")
    assert forecast["measured_steps"] == forecast["checkpoint_bytes"] == 0
    assert forecast["validations"] == 2


def test_the_plan_counts_the_unusable_pairs_that_it_read(tmp_path, capsys):
    from tests.conftest import write_shard

    write_shard(tmp_path / "data" / "train" / "0.tar", range(64), bad=[3, 5])
    write_shard(tmp_path / "data" / "val" / "0.tar", range(1000, 1020), bad=[1003])
    flags = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "none")]
    forecast = planned(capsys, *flags, "--max-bad", "0.5", "--epochs", "1")
    assert forecast["unusable"] == 3


def test_an_error_that_would_stop_the_run_stops_the_plan(tmp_path, capsys):
    assert run(["train", *SMALL, "--data-dir", str(tmp_path / "none"), "--plan"]) == 3
    assert "error: " in capsys.readouterr().err
