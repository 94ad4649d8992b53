import json

import pytest

from clipft.core.errors import UsageError
from clipft.runs.folder import (
    RunPaths,
    append_lines,
    check_unlocked,
    cut_lines,
    read_run,
    run_lock,
    run_settings,
)


def test_every_file_of_a_run_has_its_documented_name(tmp_path):
    paths = RunPaths(tmp_path / "dual_lora")
    assert paths.checkpoint == tmp_path / "dual_lora_checkpoint.pt"
    assert {path.name for path in paths.contents()} == {
        *("best.pt", "adapter", "settings.toml", "metrics.jsonl", "skipped.jsonl", "run.json"),
        *("rankings-before.json", "rankings-best.json", "evaluation.json", "result.json"),
        *("kept.json", "interpolation.json", "report.html", "report.json", "wandb_id", "tracking"),
        *("judgments.jsonl", "soup.json"),
    }
    assert paths.unused_earlier() == tmp_path / "dual_lora.earlier-1"
    paths.unused_earlier().mkdir()
    assert paths.unused_earlier() == tmp_path / "dual_lora.earlier-2"


def test_lines_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"kind": "epoch", "epoch": 0, "step": 0},
        {"kind": "step", "step": 1},
        {"kind": "step", "step": 2},
        {"kind": "epoch", "epoch": 1, "step": 2},
        {"kind": "step", "step": 3},
    ]
    append_lines(path, lines)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    cut_lines(path, done_steps=2, done_epochs=0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    cut_lines(tmp_path / "none.jsonl", 2, 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_one_run_at_a_time(tmp_path):
    with (
        run_lock(tmp_path / "run"),
        pytest.raises(UsageError, match=r"already in progress in .*run \(process \d+"),
        run_lock(tmp_path / "run"),
    ):
        pass
    with run_lock(tmp_path / "run"):
        pass


def test_looking_for_another_run_makes_nothing(tmp_path):
    check_unlocked(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run"), pytest.raises(UsageError, match="already in progress"):
        check_unlocked(tmp_path / "run")
    check_unlocked(tmp_path / "run")


def test_a_run_is_read_from_its_folder(tmp_path):
    paths = RunPaths(tmp_path)
    with pytest.raises(UsageError, match="no run in"):
        read_run(tmp_path)
    paths.settings.write_text("epochs = 7\n")
    append_lines(paths.metrics, [{"kind": "step", "step": 1}, {"kind": "epoch", "epoch": 1}])
    append_lines(paths.skipped, [{"split": "val", "key": str(n)} for n in range(60)])
    records = read_run(tmp_path)
    assert records.steps == [{"kind": "step", "step": 1}]
    assert records.epochs == [{"kind": "epoch", "epoch": 1}]
    assert records.skipped_counts == {"val": 60} and len(records.skipped) == 50
    changed = [entry for entry in records.settings if entry["changed"]]
    assert [(entry["name"], entry["value"]) for entry in changed] == [("epochs", 7)]
    assert records.result is None


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    paths = RunPaths(tmp_path)
    paths.metrics.touch()
    paths.settings.write_text("epochs = 0\n")
    with pytest.raises(UsageError, match=r"settings\.toml was changed after the run wrote it"):
        run_settings(tmp_path)
    paths.settings.write_text("")
    paths.result.write_text("{")
    with pytest.raises(UsageError, match=r"result\.json is not a readable JSON file"):
        read_run(tmp_path)
