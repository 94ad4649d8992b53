"""JSON: lines or a list of objects, in any of Unicode's encodings."""

import json
from pathlib import Path

import pytest

from clipft.core.errors import DataError
from clipft.data.packing.options import PackOptions
from clipft.data.packing.rows.json_rows import JsonTable


def read(path: Path) -> list[object]:
    return [row for _, row in JsonTable(path, PackOptions()).rows()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_rows_in_every_encoding(tmp_path, encoding, suffix):
    rows = [{"image": "a.jpg", "caption": "Stühle\u2028"}, {"image": "b.jpg", "size": {"w": 1}}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = json.dumps(rows, indent=1) if suffix == ".json" else "\r\n\r\n".join(lines)
    (tmp_path / f"t{suffix}").write_bytes(text.encode(encoding))
    assert read(tmp_path / f"t{suffix}") == rows
    assert JsonTable(tmp_path / f"t{suffix}", PackOptions()).columns == ["image", "caption", "size"]


def test_a_line_that_is_not_an_object_has_a_reason(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg"}\n{"image": \n[1]\n' + "1" * 5000)
    reasons = ["not valid JSON", "not a JSON object", "not valid JSON"]
    assert read(tmp_path / "t.jsonl") == [{"image": "a.jpg"}, *reasons]


@pytest.mark.parametrize("text", ["[", '{"image": "a.jpg"}', "null", "[1, 2]"])
def test_a_file_that_is_no_list_of_objects_is_an_error(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError):
        read(tmp_path / "t.json")
