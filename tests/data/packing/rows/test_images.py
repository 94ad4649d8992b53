"""What a cell of a table names: a path however it is written, a URL, or the image itself."""

import base64
import io
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from clipft.data.packing.rows.images import ImageCells
from clipft.data.shards.tar import ByteRange


def image_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def found(table: Path, cell: object, *others: object) -> object:
    cells = ImageCells(table, table.parent / "saved", [cell, *others])
    result = cells.find(cell, 1)
    return result if isinstance(result, str) else result[2]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.jpg").touch()
    return tmp_path / "set" / "t.csv"


@pytest.mark.parametrize(
    "cell",
    [
        "images/a.jpg",
        " images/a.jpg ",
        "./images/a.jpg",
        "images\\a.jpg",
        ".\\images\\a.jpg",
        "E:\\AI\\set\\images\\a.jpg",
        "/content/drive/MyDrive/set/images/a.jpg",
        b"images/a.jpg",
        {"path": "images/a.jpg", "bytes": None},
        ["images/a.jpg"],
    ],
)
def test_paths_are_found_however_they_are_written(table, cell):
    first = cell if isinstance(cell, str) else "images/a.jpg"
    cells = ImageCells(table, table.parent / "saved", [first])
    place = cells.find(cell, 1)
    assert not isinstance(place, str)
    assert Path(place[1]).samefile(table.parent / "images" / "a.jpg")


def test_paths_may_start_from_the_working_folder(table, monkeypatch):
    monkeypatch.chdir(table.parent.parent)
    cells = ImageCells(table, table.parent / "saved", ["set/images/a.jpg"])
    assert Path(cells.find("set/images/a.jpg", 1)[1]).samefile(table.parent / "images" / "a.jpg")


def test_only_the_start_that_the_first_rows_have_is_left_out(table):
    (table.parent / "a.jpg").touch()
    cells = ImageCells(table, table.parent / "saved", ["/other/set/images/a.jpg"])
    assert cells.prefix == "/other/set/"
    assert cells.find("/third/images/a.jpg", 2)[1] == "/third/images/a.jpg"


def test_a_file_with_a_backslash_in_its_name_is_itself(table):
    (table.parent / "b\\c.jpg").touch()
    assert found(table, "b\\c.jpg", "images\\a.jpg") == ByteRange(str(table.parent / "b\\c.jpg"))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_match_however_they_are_encoded(table, forms):
    on_disk, in_table = (unicodedata.normalize(form, "Stühle.jpg") for form in forms)
    (table.parent / on_disk).touch()
    assert found(table, in_table) == ByteRange(str(table.parent / on_disk))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize(
    "written",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: base64.encodebytes(data).decode(),
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
        lambda data: {"bytes": base64.b64encode(data).decode(), "path": None},
        lambda data: data,
        lambda data: {"bytes": data, "path": "x.png"},
    ],
    ids=["plain", "urlsafe", "lines", "data", "object", "bytes", "hugging face"],
)
def test_images_within_the_table_are_saved(table, kind, written):
    data = image_bytes(kind)
    place = found(table, written(data))
    assert isinstance(place, ByteRange)
    assert Path(place.path).read_bytes() == data


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("", "no image is named"),
        (None, "no image is named"),
        (7, "no image is named"),
        (float("nan"), "no image is named"),
        (["a.jpg", "b.jpg"], "no image is named"),
        ("ftp://example.com/a.jpg", "neither a path nor an http or https address"),
        ("data:image/png,x", "neither a path nor an http or https address"),
    ],
)
def test_other_cells_have_a_reason(table, cell, reason):
    assert found(table, cell) == reason
