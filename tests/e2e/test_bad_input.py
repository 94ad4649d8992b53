"""A user's mistake ends in one clear error and the right exit code, and nothing is lost."""

import json
from pathlib import Path

import pytest

from clipft.cli.app import run
from tests.conftest import write_shard
from tests.tiny_run import TINY


def one_error(capsys) -> tuple[str, str]:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(errors) == len(hints) == 1
    assert "Traceback" not in "".join(lines)
    return errors[0], hints[0]


def test_a_folder_without_shards_is_named_with_its_content(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "b.jpg", "a.txt"):
        (tmp_path / "train" / name).touch()
    assert run(["train", *TINY, "--data-dir", str(tmp_path)]) == 3
    error, hint = one_error(capsys)
    assert str(tmp_path / "train") in error
    assert "2 .jpg" in error
    assert "clipft pack" in hint


def test_a_missing_data_folder_is_refused(tmp_path, capsys):
    assert run(["train", *TINY, "--data-dir", str(tmp_path / "none")]) == 3
    assert "no folder" in one_error(capsys)[0]


def test_an_unknown_scenario_is_refused(capsys):
    assert run(["train", *TINY, "--scenario", "dual_lara"]) == 2
    assert "did you mean dual_lora" in one_error(capsys)[0]


def test_an_unknown_key_in_a_settings_file_is_refused(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text("lora_rank = 8\n")
    assert run(["train", "--config", str(file)]) == 2
    error, hint = one_error(capsys)
    assert "lora_rank" in error
    assert "lora_r" in hint


def test_a_model_that_cannot_be_loaded_is_named(catalogue, tmp_path, capsys):
    more = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    assert run(["train", *more, "--model", "nobody/nothing"]) == 5
    error, hint = one_error(capsys)
    assert "nobody/nothing" in error
    assert "local folder" in hint


def test_a_corrupt_image_is_skipped_and_listed(tmp_path, capsys):
    write_shard(tmp_path / "train" / "00000.tar", range(128), bad=[5])
    write_shard(tmp_path / "val" / "00000.tar", range(1000, 1020))
    out = tmp_path / "out"
    args = ["train", *TINY, "--data-dir", str(tmp_path), "--output-dir", str(out), "--json"]
    assert run(args) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["skipped_pairs"] == 1
    assert "skipped 1 bad pair, listed in" in printed.err
    skipped = [json.loads(x) for x in (out / "dual_lora/skipped.jsonl").read_text().splitlines()]
    assert [(s["shard"], s["key"]) for s in skipped] == [("00000.tar", "00005")]
    assert "truncated" in skipped[0]["reason"].lower()


def test_too_many_corrupt_images_stop_the_run(tmp_path, capsys):
    write_shard(tmp_path / "train" / "00000.tar", range(128), bad=range(0, 128, 8))
    write_shard(tmp_path / "val" / "00000.tar", range(1000, 1020))
    out = tmp_path / "out"
    args = ["train", *TINY, "--data-dir", str(tmp_path), "--output-dir", str(out)]
    assert run(args) == 3
    error, hint = one_error(capsys)
    assert "--max-bad" in error
    assert "skipped.jsonl" in hint


def test_an_unwritable_output_folder_is_found_before_training(catalogue, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.touch()
    args = ["train", *TINY, "--data-dir", str(catalogue), "--output-dir", str(blocker / "x")]
    assert run(args) == 4
    assert str(blocker) in one_error(capsys)[0]


def test_a_second_run_in_the_same_folder_is_refused(catalogue, tmp_path, capsys):
    from clipft.config.sources import load_settings
    from clipft.runs.folder import run_lock

    settings = load_settings({"output_dir": str(tmp_path)}, environ={}).values
    args = ["train", *TINY, "--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    with run_lock(settings.run_dir):
        assert run(args) == 2
    assert "already in progress" in one_error(capsys)[0]
    assert run(args) == 0  # a lock file that no process holds does not count


def test_json_mode_prints_errors_as_json(capsys):
    assert run(["train", "--epochs", "0", "--json"]) == 2
    captured = capsys.readouterr()
    body = json.loads(captured.out)["error"]
    assert body["exit_code"] == 2
    assert "--epochs" in body["message"]


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a checkpoint"], ids=["empty", "zip", "text"]
)
def test_a_broken_checkpoint_is_refused(tmp_path, capsys, content):
    path = tmp_path / "dual_lora_checkpoint.pt"
    path.write_bytes(content)
    assert run(["resume", str(path)]) == 5
    assert str(path) in one_error(capsys)[0]


def test_debug_shows_the_traceback(capsys):
    assert run(["train", "--epochs", "0", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_paths_may_hold_spaces_and_any_letters(catalogue, tmp_path, capsys):
    odd = tmp_path / "Möbel katalog 家具"
    odd.mkdir()
    (odd / "data").symlink_to(Path(catalogue))
    args = [*("--data-dir", str(odd / "data")), *("--output-dir", str(odd / "aus gabe"))]
    assert run(["train", *TINY, *args]) == 0
    assert run(["evaluate", str(odd / "aus gabe" / "dual_lora"), *args[:2]]) == 0
