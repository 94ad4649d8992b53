"""Tables as people bring them: each is packed rightly, or refused with what to do."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clipft.cli.app import run
from clipft.core.errors import DataError, UsageError
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Listing
from clipft.data.packing.sources import list_pairs
from clipft.data.shards.folders import open_pairs
from tests.data.packing.pack_helpers import metadata_of, packed, pattern, write_pair

ROWS = 12


def listed(table: Path, **options: Any) -> Listing:
    out = table.parent / "out"
    return list_pairs(table, out, PackOptions(**options), out / "pictures")


def captions(listing: Listing) -> list[object]:
    return [candidate.caption for candidate in listing.candidates]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the images img/0.png to img/11.png, which is also the working folder."""
    (tmp_path / "shop" / "img").mkdir(parents=True)
    for number in range(ROWS):
        pattern(number).save(tmp_path / "shop" / "img" / f"{number}.png")
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


def write(table: Path, header: str, row: str, encoding: str = "utf-8") -> Path:
    """Write a table; ``{n}`` in ``row`` becomes the number of the row."""
    lines = [header, *(row.replace("{n}", str(number)) for number in range(ROWS))]
    table.write_bytes("\n".join(lines).encode(encoding))
    return table


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_stray_quotation_mark_swallows_no_rows(shop, delimiter):
    lines = [f"img/{number}.png{delimiter}a chair {number}" for number in range(ROWS)]
    lines[3] = f'img/3.png{delimiter}"Oslo sofa blue'
    lines[9] = f'img/9.png{delimiter}24" shelf "Alma"'
    (shop / "t.csv").write_text("\n".join([f"filepath{delimiter}title", *lines]))
    result = packed(shop / "t.csv", shop / "out", val_share=0)
    assert result.train_pairs == ROWS
    assert result.notes == [
        f"{shop}/t.csv: guessed where cells end in row 4, because of their quotation marks or "
        "delimiters."
    ]
    assert {'"Oslo sofa blue', '24" shelf "Alma"'} <= metadata_of(shop / "out" / "train").keys()


def test_captions_with_unquoted_delimiters_are_refused(shop):
    table = write(shop / "t.csv", "image,caption", "img/{n}.png,a chair, number {n}, oak")
    with pytest.raises(DataError, match="12 of the 12 rows") as caught:
        packed(table, shop / "out")
    assert "row 1: more cells than the header (4 instead of 2)" in caught.value.message
    assert "separated by a comma" in caught.value.hint
    assert not (shop / "out").exists()


def test_rows_that_cannot_be_meant_are_counted_and_shown_by_number(shop):
    table = write(shop / "t.csv", "image,caption", "img/{n}.png,a chair {n}")
    with table.open("a") as file:
        file.write("\nimg/1.png,one, two\nimg/2.png\n,,\nimg/3.png,a,b,c\n")
    result = packed(table, shop / "out", val_share=0)
    assert result.train_pairs == ROWS
    assert result.skipped == {"more cells than the header": 2, "fewer cells than the header": 1}
    assert f"{table}: skipped rows 13, 16: more cells than the header." in result.notes
    skipped = (shop / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped[0])["file"] == f"{table} row 13"


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("filepath;title", "img/{n}.png;a chair, number {n}"),
        ("filepath\ttitle", "img/{n}.png\ta chair, number {n}"),
        ("image_name| comment_number| comment", "img/{n}.png| 0| a chair, number {n}"),
        ("Image,Caption", 'img/{n}.png,"a chair, number {n}"'),
        ("URL,TEXT", 'img/{n}.png,"a chair, number {n}"'),
        ("Image Path,Caption", 'img/{n}.png,"a chair, number {n}"'),
        ("image, caption", 'img/{n}.png, "a chair, number {n}"'),
        ("filepath,title", 'img\\{n}.png,"a chair, number {n}"'),
        ("filepath,title", 'E:\\AI\\set\\img\\{n}.png,"a chair, number {n}"'),
        ("filepath,title", '/content/drive/MyDrive/set/img/{n}.png,"a chair, number {n}"'),
    ],
)
@pytest.mark.parametrize(("name", "encoding"), [("t.csv", "utf-8-sig"), ("t.txt", "utf-16")])
def test_tables_of_every_kind_of_writer_are_read(shop, header, row, name, encoding):
    listing = listed(write(shop / name, header, row, encoding))
    assert captions(listing) == [f"a chair, number {n}".encode() for n in range(ROWS)]
    for number, candidate in enumerate(listing.candidates):
        assert Path(candidate.image.path).samefile(shop / "img" / f"{number}.png")
        assert candidate.name == str(number)


def test_where_images_were_found_is_said(shop):
    table = write(shop / "t.csv", "image,caption", "/mnt/set/img/{n}.png,a chair")
    assert listed(table).notes == [
        f"{table}: found the images in {shop}, without /mnt/set/ in their paths."
    ]
    (shop / "tables").mkdir()
    table = write(shop / "tables" / "t.csv", "image,caption", "img/{n}.png,a chair")
    assert listed(table).notes == [
        f"{table}: the paths of the images are relative to the working folder."
    ]


def test_when_no_image_is_there_the_first_path_is_named(shop):
    table = write(shop / "t.csv", "image,caption", "pics/{n}.gone,a chair")
    with pytest.raises(DataError, match=f"none of the 12 images.*{shop}/pics/0.gone"):
        packed(table, shop / "out")


def test_another_encoding_is_refused_by_line_and_can_be_told(shop):
    table = write(shop / "t.csv", "image,caption", "img/{n}.png,Stühle {n}", "cp1252")
    with pytest.raises(DataError, match="as UTF-8: line 2") as caught:
        listed(table)
    assert "--encoding cp1252" in caught.value.hint
    assert captions(listed(table, encoding="cp1252"))[0] == "Stühle 0".encode()


@pytest.mark.parametrize("missing", ["NaN", "null", '"nan"', '""', '" "'])
def test_captions_that_are_missing_are_empty(shop, missing):
    lines = [f'{{"image": "img/{n}.png", "caption": "a chair {n}"}}' for n in range(ROWS)]
    lines[0] = f'{{"image": "img/0.png", "caption": {missing}}}'
    (shop / "t.jsonl").write_text("\n".join(lines))
    result = packed(shop / "t.jsonl", shop / "out", val_share=0)
    assert (result.train_pairs, result.skipped) == (ROWS - 1, {"empty caption": 1})


@pytest.mark.parametrize("value", ["true", "{}", "[[1]]"])
def test_captions_that_are_not_text_are_skipped(shop, value):
    (shop / "t.jsonl").write_text(f'{{"image": "img/0.png", "caption": {value}}}\n')
    (entry,) = listed(shop / "t.jsonl").skipped
    assert entry["reason"] == "the caption is not text"


def test_base64_and_long_cells(shop):
    image = base64.b64encode((shop / "img" / "1.png").read_bytes()).decode()
    (shop / "t.tsv").write_text(f"id\timage\tcaption\thtml\n1\t{image}\ta chair\t{'x' * 200_000}\n")
    result = packed(shop / "t.tsv", shop / "out", val_share=0)
    assert result.train_pairs == 1
    pair = open_pairs(shop / "out" / "train")[0]
    assert pair.image == (shop / "img" / "1.png").read_bytes()
    assert len(json.loads(pair.metadata)["html"]) == 200_000


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("img/0.png,a chair", "the first line seems to be data"),
        ("image,captin_text", "--caption-column"),
        ("x" * 9999 + ",y", "--image-column"),
    ],
)
def test_a_table_without_the_columns_is_refused(shop, line, hint):
    (shop / "t.csv").write_text(f"{line}\nimg/1.png,a table\n")
    with pytest.raises(UsageError) as caught:
        listed(shop / "t.csv")
    assert hint in caught.value.hint
    assert len(caught.value.message) < 500


def test_a_column_that_is_not_there_is_refused_with_the_nearest_name(shop):
    table = write(shop / "t.csv", "Photo,Product Text", "img/{n}.png,a chair {n}")
    with pytest.raises(
        UsageError, match="no column product_txt; it has Photo, Product Text"
    ) as caught:
        listed(table, image_column="photo", caption_column="product_txt")
    assert "did you mean Product Text?" in caught.value.hint
    assert len(captions(listed(table, image_column="photo", caption_column="product text"))) == ROWS


def write_products(shop: Path, suffix: str) -> Path:
    """Write a table whose rows have a field of an object and a field with a dot in its name."""
    table = shop / f"products{suffix}"
    rows: list[dict[str, Any]] = [
        {
            "image": f"img/{n}.png",
            "caption": f"a chair {n}",
            "product.id": n // 3,
            "size": {"width": n},
        }
        for n in range(ROWS)
    ]
    if suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), table)
    elif suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        cells = [f"img/{n}.png,a chair {n},{n // 3},{n}" for n in range(ROWS)]
        table.write_text("\n".join(["image,caption,product.id,size.width", *cells]))
    else:
        for row in rows:
            number = row["size"]["width"]
            write_pair(table / f"{number}.png", number, row["caption"], json.dumps(row))
    return table


SUFFIXES = [".csv", ".jsonl", ".parquet", ""]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"group_field": "prodct.id"}, "did you mean product.id?"),
        ({"group_field": "size.widht"}, "did you mean size.width?"),
        ({"group_field": "size"}, "did you mean size.width?"),
        ({"caption": "{size.width} {product.idd}"}, "did you mean product.id?"),
    ],
)
def test_a_field_that_no_pair_has_is_refused_before_anything_is_written(
    shop, suffix, options, hint
):
    table = write_products(shop, suffix)
    with pytest.raises(UsageError, match="no pair has a field") as caught:
        packed(table, shop / "out", **options)
    assert hint in caught.value.hint
    assert not (shop / "out").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_groups_by_a_field_with_a_dot_stay_in_one_split(shop, suffix):
    packed(write_products(shop, suffix), shop / "out", val_share=0.3, group_field="product.id")
    sides = []
    for split in ("train", "val"):
        pairs = open_pairs(shop / "out" / split)
        sides.append({pairs.metadata(number)["product.id"] for number in range(len(pairs))})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_template_makes_the_captions_and_keeps_the_fields(shop, suffix):
    table = write_products(shop, suffix)
    template = "{caption} of product {product.id}, {size.width} cm"
    packed(table, shop / "out", val_share=0, caption=template)
    found = metadata_of(shop / "out" / "train")
    assert {f"a chair {n} of product {n // 3}, {n} cm" for n in range(ROWS)} == found.keys()
    assert found["a chair 4 of product 1, 4 cm"]["caption"] == "a chair 4"


def test_a_template_needs_no_captions(shop):
    table = write(shop / "t.csv", "image,kind,color", "img/{n}.png,chair,color {n}")
    packed(table, shop / "a", val_share=0, caption="{kind}, {color}")
    assert "chair, color 3" in metadata_of(shop / "a" / "train")
    for number in range(ROWS):
        write_pair(shop / "raw" / f"{number}.png", number, None, f'{{"kind": "chair {number}"}}')
    packed(shop / "raw", shop / "b", val_share=0, caption="a {kind}")
    assert "a chair 3" in metadata_of(shop / "b" / "train")
    packed(shop / "b", shop / "c", val_share=0, caption="the {kind}", overwrite=True)
    assert "the chair 3" in metadata_of(shop / "c" / "train")


def test_a_group_field_that_is_empty_everywhere_is_refused(shop):
    table = write(shop / "t.csv", "image,caption,sku", "img/{n}.png,a chair {n},NaN")
    with pytest.raises(UsageError, match="no pair has a field 'sku'"):
        packed(table, shop / "out", group_field="sku")


def test_pairs_without_a_group_are_counted(shop):
    table = write(shop / "t.csv", "image,caption,sku", "img/{n}.png,a chair {n},")
    table.write_text(table.read_text().replace("a chair 1,", "a chair 1,7"))
    result = packed(table, shop / "out", group_field="sku")
    assert result.notes == ["11 pairs without sku: each is a group of its own."]


def test_pairs_without_a_label_are_counted_and_a_wrong_field_is_refused(shop):
    table = write(shop / "t.csv", "image,caption,kind", "img/{n}.png,a chair,")
    table.write_text(table.read_text().replace("1.png,a chair,", "1.png,a chair,chair"))
    result = packed(table, shop / "out", label_field="kind")
    assert result.notes == ["10 pairs without kind: they are split by their captions."]
    with pytest.raises(UsageError, match="--label-field: no pair has a field 'kinds'"):
        packed(table, shop / "other", label_field="kinds")


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", ""), ("t.csv", "image,caption\n"), ("t.jsonl", "\n"), ("t.json", "[]")],
)
def test_a_table_without_rows_is_refused(shop, name, text):
    (shop / name).write_text(text)
    with pytest.raises(DataError, match="has no rows"):
        listed(shop / name)


def test_a_sheet_is_refused_with_what_to_do(shop):
    shutil.copy(shop / "img" / "0.png", shop / "t.xlsx")
    with pytest.raises(DataError) as caught:
        listed(shop / "t.xlsx")
    assert caught.value.hint == "export the sheet as CSV in UTF-8"


def test_inspect_shows_what_pack_skipped(shop, capsys):
    table = write(shop / "t.csv", "image,caption", "img/{n}.png,a chair {n}")
    table.write_text(
        table.read_text().replace("a chair 3", "a chair, 3").replace("a chair 5", "nan")
    )
    packed(table, shop / "out")
    args = ["inspect", "out", "--model", "tiny", "--html", "page.html"]
    assert run([*args, "--json"]) == 0
    wanted = {"more cells than the header": 1, "empty caption": 1}
    assert json.loads(capsys.readouterr().out)["skipped_by_pack"] == wanted
    assert run(args) == 0
    assert "Skipped by clipft pack" in capsys.readouterr().out
    assert "more cells than the header" in (shop / "page.html").read_text()
