"""Delimited text: encodings, delimiters and quotes of many writers, and files that are damaged."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clipft.core.errors import DataError
from clipft.data.packing.options import PackOptions
from clipft.data.packing.rows.delimited import MISSING, UNMATCHED, DelimitedTable

COLUMNS = ("image", "caption", "sku")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")
texts = st.text(
    st.sampled_from('abc ABC 019 éüñß€ """\',,;;\t|\\\\\r\n\u2028\x0b\x85=-@/.<>&#')
    | st.characters(codec="cp1252", exclude_characters="\0"),
    max_size=12,
)
quotings = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
line_ends = st.sampled_from(["\n", "\r\n"])
fast = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path: Path, **options: object) -> tuple[DelimitedTable, list[object]]:
    table = DelimitedTable(path, PackOptions(**options))
    return table, [row for _, row in table.rows("image")]


def read_text(tmp_path: Path, text: str, name: str = "t.csv", **options: object) -> list[object]:
    (tmp_path / name).write_bytes(text.encode())
    return read(tmp_path / name, **options)[1]


def as_read(value: str) -> str | None:
    return None if value in MISSING else value


@fast
@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=6),
    encoding=st.sampled_from(ENCODINGS),
    delimiter=st.sampled_from(",;\t|"),
    quoting=quotings,
    line_end=line_ends,
    suffix=st.sampled_from([".csv", ".tsv", ".txt"]),
    writer=st.sampled_from(["csv", "pandas"]),
)
@example([('"', "")], "utf-8", ",", csv.QUOTE_MINIMAL, "\n", ".csv", "csv")
def test_what_writers_write_is_read_back_equal(
    tmp_path, pairs, encoding, delimiter, quoting, line_end, suffix, writer
):
    if quoting == csv.QUOTE_MINIMAL:  # before Python 3.13 it leaves a carriage return unquoted
        pairs = [[text.replace("\r", "") for text in values] for values in pairs]
    if encoding == "cp1252":
        pairs = [[text.encode("cp1252", "ignore").decode("cp1252") for text in v] for v in pairs]
    rows = [(f"{number}.jpg", *values) for number, values in enumerate(pairs)]
    path = tmp_path / f"t{suffix}"
    if writer == "pandas":
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(rows, columns=COLUMNS)
        frame.to_csv(
            path, index=False, sep=delimiter, quoting=quoting, encoding=encoding,
            lineterminator=line_end,
        )  # fmt: skip
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            out = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
            out.writerows([COLUMNS, *rows])
    told = {"encoding": encoding} if encoding == "cp1252" else {}
    table, found = read(path, **told)
    wanted = [dict(zip(COLUMNS, map(as_read, row), strict=True)) for row in rows]
    assert found == wanted
    assert not table.repaired


@fast
@given(data=st.data(), delimiter=st.sampled_from(",;\t|"), quoting=quotings)
def test_a_stray_quotation_mark_spoils_no_other_row(tmp_path, data, delimiter, quoting):
    words = st.text("abc xy0", min_size=1, max_size=8)
    captions = data.draw(st.lists(words, min_size=2, max_size=8))
    text = io.StringIO()
    out = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    out.writerow(["image", "caption"])
    for number, caption in enumerate(captions):
        out.writerow([f"img/{number}.jpg", caption])
    lines = text.getvalue().splitlines()
    hurt = data.draw(st.sets(st.integers(0, len(captions) - 1), min_size=1, max_size=2))
    for number in hurt:
        line = lines[number + 1]
        at = data.draw(st.integers(line.index(delimiter) + 1, len(line)))
        lines[number + 1] = line[:at] + '"' + line[at:]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    found = read(tmp_path / "t.csv")[1]
    assert len(found) == len(captions)
    for number, row in enumerate(found):
        if number not in hurt:
            assert row == {"image": f"img/{number}.jpg", "caption": captions[number]}
        else:
            assert row == UNMATCHED or "\n" not in str(row["caption"])


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('1.jpg,"Oslo sofa blue', '"Oslo sofa blue'),
        ('1.jpg,24" shelf', '24" shelf'),
        ('1.jpg,"24" shelf, oak"', '24" shelf, oak'),
        ('1.jpg,"a \\"fine\\" chair"', 'a "fine" chair'),
        ('1.jpg,"a fine\\", wide chair"', 'a fine", wide chair'),
        ('1.jpg, "a red, wide chair"', "a red, wide chair"),
        ('1.jpg,"a ""fine"" chair" ', 'a "fine" chair'),
        ("1.jpg,a chair,,", "a chair"),
    ],
)
def test_quotes_that_break_the_rules_are_read_as_they_are_meant(tmp_path, line, caption):
    rows = read_text(tmp_path, f"image,caption\n0.jpg,before\n{line}\n2.jpg,after\n")
    assert rows == [
        {"image": "0.jpg", "caption": "before"},
        {"image": "1.jpg", "caption": caption},
        {"image": "2.jpg", "caption": "after"},
    ]


def test_quotes_escaped_with_backslashes_may_go_over_several_lines(tmp_path):
    page = '<p class=\\"x\\">Oak,\\nC:\\dir</p>\n<p>\\"fine\\", see</p>'
    text = f'image,html,color\n1.jpg,"{page}",red\n2.jpg,"a \\"b",blue\n3.jpg,plain,green\n'
    assert read_text(tmp_path, text) == [
        {"image": "1.jpg", "html": page.replace('\\"', '"'), "color": "red"},
        {"image": "2.jpg", "html": 'a "b', "color": "blue"},
        {"image": "3.jpg", "html": "plain", "color": "green"},
    ]


def test_a_quote_that_a_later_row_closes_does_not_swallow_the_rows_between(tmp_path):
    text = 'image,caption\n1.jpg,"an oak desk\n2.jpg,a chair\n3.jpg,a shelf of 24"\n4.jpg,a sofa\n'
    rows = read_text(tmp_path, text)
    assert [row["caption"] for row in rows] == [
        '"an oak desk',
        "a chair",
        'a shelf of 24"',
        "a sofa",
    ]


def test_a_description_of_many_lines_stays_whole(tmp_path):
    page = "<p>Oak, oiled</p>\n<p>W 20, D 30</p>\n\nsee, also"
    text = f'description,color,image\n"{page}",red,a.jpg\n"one\ntwo",blue,b.jpg\n'
    assert read_text(tmp_path, text) == [
        {"description": page, "color": "red", "image": "a.jpg"},
        {"description": "one\ntwo", "color": "blue", "image": "b.jpg"},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1.jpg,a red, wide chair", "more cells than the header (3 instead of 2)"),
        ("1.jpg,a red\rchair", "fewer cells than the header (1 instead of 2)"),
        ("the rest of a text", "fewer cells than the header (1 instead of 2)"),
        ('1.jpg,"a red, wide chair', UNMATCHED),
    ],
)
def test_a_row_that_cannot_be_meant_has_a_reason(tmp_path, line, reason):
    rows = read_text(tmp_path, f"image,caption\n0.jpg,before\n{line}\n2.jpg,after\n")
    assert rows[-2] == reason
    assert [row["image"] for row in (rows[0], rows[-1])] == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize(
    "text", ["sep=;\nimage;caption\na.jpg;x, y\n", "\n\nimage;caption\r\na.jpg;x, y"]
)
def test_the_header_is_found(tmp_path, text):
    assert read_text(tmp_path, text) == [{"image": "a.jpg", "caption": "x, y"}]


def test_the_delimiter_may_be_named(tmp_path):
    rows = read_text(tmp_path, "image^caption\na.jpg^x, y\n", delimiter="^")
    assert rows == [{"image": "a.jpg", "caption": "x, y"}]
    assert read_text(tmp_path, "image\tcaption\na\tb\n", delimiter="tab") == [
        {"image": "a", "caption": "b"}
    ]


def test_missing_values_empty_rows_and_columns_without_a_name(tmp_path):
    text = ",image,caption,size,size\n0,a.jpg,nan,1,2\n,,,,\n\n1,b.jpg,Nan bread,NULL,\n"
    assert read_text(tmp_path, text) == [
        {"image": "a.jpg", "caption": None, "size": "1", "size_2": "2"},
        {"image": "b.jpg", "caption": "Nan bread", "size": None, "size_2": ""},
    ]


def test_cells_may_be_longer_than_the_csv_module_expects(tmp_path):
    (row,) = read_text(tmp_path, f"image,caption,html\na.jpg,x,{'<p>' * 100_000}\n")
    assert len(row["html"]) == 300_000


def test_another_encoding_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,caption\na.jpg,x\nb.jpg,Stühle".encode("cp1252"))
    with pytest.raises(DataError, match="line 3") as caught:
        read(tmp_path / "t.csv")
    assert "--encoding cp1252" in caught.value.hint
    assert read(tmp_path / "t.csv", encoding="cp1252")[1][1]["caption"] == "Stühle"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"encoding": "utf9"}, "did you mean utf-8?"),
        ({"encoding": "cp152"}, "did you mean cp1252?"),
        ({"encoding": "rot13"}, "is not an encoding"),
        ({"encoding": "weird"}, "write for example utf-8"),
        ({"delimiter": ";;"}, "write for example ;"),
        ({"delimiter": '"'}, "write for example ;"),
    ],
)
def test_an_impossible_encoding_or_delimiter_is_refused(options, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        PackOptions(**options)
