"""Parquet: columns of every type become values of JSON, or are left out by name."""

import datetime
import decimal
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from clipft.core.errors import DataError
from clipft.data.packing.rows import arrow
from clipft.data.packing.rows.arrow import ArrowTable, plain_value

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NOON = datetime.datetime(2020, 1, 2, 12, 30)


def read(folder: Path, **columns: Any) -> tuple[ArrowTable, list[dict[str, Any]]]:
    path = folder / "t.parquet"
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], **columns}), path)
    table = ArrowTable(path)
    return table, [plain_value(row) for _, row in table.rows("image", "caption")]


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (pa.timestamp("us"), NOON, "2020-01-02T12:30:00"),
        (pa.timestamp("ns"), 1_577_968_200_123_456_789, "2020-01-02T12:30:00.123456789"),
        (pa.timestamp("ms", "Europe/Oslo"), NOON, "2020-01-02T12:30:00+00:00"),
        (pa.timestamp("ms"), 999_999_999_999_000, "33658-09-27T01:46:39"),
        (pa.date32(), datetime.date(2020, 1, 2), "2020-01-02"),
        (pa.date32(), 10_000_000, "29349-01-26"),
        (pa.date64(), datetime.date(2020, 1, 2), "2020-01-02"),
        (pa.time32("s"), datetime.time(12, 30), "12:30:00"),
        (pa.time64("ns"), 45_000_000_000_001, "12:30:00"),
        (pa.duration("ns"), 1_500_000_001, 1.500000001),
        (pa.duration("s"), 10**12, 1e12),
        (pa.decimal128(10, 2), decimal.Decimal("19.90"), 19.9),
        (pa.dictionary(pa.int8(), pa.string()), "red", "red"),
        (pa.large_string(), "red", "red"),
        (pa.float16(), 0.5, 0.5),
        (pa.list_(pa.int64()), [1, 2], [1, 2]),
        (pa.struct({"width": pa.int64()}), {"width": 3}, {"width": 3}),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)], [["a", 1]]),
    ],
    ids=str,
)
def test_every_type_becomes_json(tmp_path, kind, value, wanted):
    table, rows = read(tmp_path, x=pa.array([value, None], kind))
    assert [row["x"] for row in rows] == [wanted, None]
    assert json.dumps(rows, allow_nan=False)
    assert not table.left_out


def test_times_need_neither_pandas_nor_a_database_of_time_zones(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    zoned = pa.array([1, 2], pa.timestamp("ns", "Nowhere/Known"))
    _, rows = read(tmp_path, x=zoned, y=pa.array([1, None], pa.duration("ns")))
    assert rows[0] == {"image": "a.jpg", "x": "1970-01-01T00:00:00.000000001+00:00", "y": 1e-9}


def test_a_column_that_python_cannot_hold_is_left_out_by_name(tmp_path):
    far = pa.array([[10_000_000], []], pa.list_(pa.date32()))
    table, rows = read(tmp_path, far=far, color=["red", "blue"])
    assert rows == [{"image": "a.jpg", "color": "red"}, {"image": "b.jpg", "color": "blue"}]
    assert "list<" in table.left_out["far"]


def test_a_column_of_captions_that_python_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot read the column caption"):
        read(tmp_path, caption=pa.array([[10_000_000], []], pa.list_(pa.date32())))


def test_columns_of_bytes_are_read_only_for_images_and_captions(tmp_path):
    table, _ = read(tmp_path, caption=pa.array([b"x", None]), other=pa.array([b"y", b"z"]))
    rows = [row for _, row in table.rows("image", "caption")]
    assert rows == [{"image": "a.jpg", "caption": b"x"}, {"image": "b.jpg", "caption": None}]


def test_text_that_is_not_utf_8_is_read_with_replacement_characters(tmp_path):
    broken = pa.array([b"caf\xe9", None], pa.binary()).cast(pa.string(), safe=False)
    assert [row["x"] for row in read(tmp_path, x=broken)[1]] == ["caf\ufffd", None]


def test_names_with_dots_and_structs_are_told_apart(tmp_path):
    table, rows = read(tmp_path, **{"size.w": ["p", "q"]}, size=[{"w": 1}, {"w": 2}])
    assert rows[0] == {"image": "a.jpg", "size.w": "p", "size": {"w": 1}}
    assert list(table.samples()) == [{"image": "", "size.w": "", "size": {"w": ""}}]


def test_uuids_are_text(tmp_path):
    key = uuid.uuid4()
    assert read(tmp_path, x=pa.array([key.bytes, None], pa.uuid()))[1][0]["x"] == str(key)


def test_batches_of_images_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "_IMAGES", 2)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [bytes([n]) for n in range(5)]}), path)
    assert [row["image"] for _, row in ArrowTable(path).rows("image")] == [
        bytes([n]) for n in range(5)
    ]
