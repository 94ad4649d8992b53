import errno
import os
from pathlib import Path

import pytest

from clipft.core.errors import StorageError
from clipft.core.files import (
    check_writable,
    did_you_mean_path,
    disk_error,
    json_lines,
    read_json,
    replacing,
    write_json,
    write_text,
)


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"name": "Stühle", "n": 1}, indent=1, ascii_only=False)
    assert path.read_text("utf-8") == '{\n "name": "Stühle",\n "n": 1\n}\n'
    assert read_json(path) == {"name": "Stühle", "n": 1}
    write_json(path, {"name": "Stühle"})
    assert path.read_bytes() == b'{"name": "St\\u00fchle"}\n'
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", None])
def test_what_is_not_a_json_object_reads_as_none(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None


def test_lines_that_were_cut_off_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    assert json_lines(path) == []
    path.write_text('{"a": "\u2028"}\n[1]\n{"b": 2}\n{"c"', encoding="utf-8")
    assert json_lines(path) == [{"a": "\u2028"}, {"b": 2}]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old")
    with (
        pytest.raises(StorageError, match=f"cannot write {path}: No space left"),
        replacing(path) as temporary,
    ):
        temporary.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_and_one_that_refuses_have_different_hints(tmp_path):
    full = disk_error(tmp_path, OSError(errno.ENOSPC, "No space left on device"), needed=3000)
    assert full.message.endswith("No space left on device, 3,000 bytes were needed")
    assert full.hint.startswith("free some space or choose another place")
    refused = disk_error(tmp_path, PermissionError(errno.EACCES, "Permission denied"), needed=3000)
    assert refused.message.endswith(": Permission denied")
    assert refused.hint.startswith("choose another place")


def test_a_folder_or_a_file_as_the_parent_cannot_be_written_to(tmp_path):
    check_writable(tmp_path / "new" / "a")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="it is a folder"):
        check_writable(tmp_path / "new")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"):
        check_writable(tmp_path / "file" / "a")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("label.txt", "did you mean labels.txt?"),
        ("labels.csv", "did you mean labels.txt?"),
        ("nope.txt", ""),
        ("catlogue", "did you mean catalogue?"),
        ("catlogue/train", "did you mean catalogue/train?"),
        ("catlogue/test", ""),
        ("./catalogue/trian", "did you mean catalogue/train?"),
        ("catalogue", ""),
        ("nowhere/at/all", ""),
        (".", ""),
    ],
)
def test_the_nearest_path_that_exists_is_offered(wrong, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalogue" / "train").mkdir(parents=True)
    for name in ("labels.txt", "before.txt", "labels.bak", ".hidden"):
        (tmp_path / name).touch()
    assert did_you_mean_path(Path(wrong)) == meant
    if wrong != ".":
        absolute = meant.replace("mean ", f"mean {tmp_path}/")
        assert did_you_mean_path(tmp_path / wrong) == absolute
