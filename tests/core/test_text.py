import codecs
import json
import tomllib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.core.text import NotText, decode, folded, read_text, visible

TEXT = st.text(st.characters(codec="utf-8"))
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@given(text=TEXT, encoding=st.sampled_from(sorted(MARKS)), named=st.sampled_from([None, "cp1252"]))
def test_a_byte_order_mark_names_the_encoding_and_is_no_content(text, encoding, named):
    if encoding == "utf-16-le" and text.startswith("\0"):
        return  # the same bytes as the mark of UTF-32
    assert decode(MARKS[encoding] + text.encode(encoding), named) == text


@given(TEXT.filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_text_without_a_mark_is_utf_8(text):
    assert decode(text.encode()) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_recognized(encoding):
    assert decode("Grüner Stuhl, 45 cm".encode(encoding)) == "Grüner Stuhl, 45 cm"


@given(st.binary())
def test_bytes_are_text_or_refused_but_never_replaced(data):
    try:
        text = decode(data)
    except NotText:
        return
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
    assert any(data in (text.encode(e), MARKS.get(e, b"") + text.encode(e)) for e in encodings) or (
        data.decode("utf-16") == text or data.decode("utf-32") == text
    )


def test_other_bytes_are_refused_by_the_name_of_the_encoding():
    with pytest.raises(NotText, match=r"^not UTF-8 text$"):
        decode(b"Gr\xfcner Stuhl")
    assert decode(b"Gr\xfcner Stuhl", "cp1252") == "Grüner Stuhl"
    with pytest.raises(NotText, match=r"^not UTF-16-LE text$"):
        decode(b"\xff\xfea")


def test_files_are_read_by_the_same_rule(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_text("Grün\n", encoding=encoding)
        assert read_text(tmp_path / "a.txt") == "Grün\n"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Stühle", unicodedata.normalize("NFD", "STÜHLE")),
        ("a  chair", "A\xa0Chair "),
        ("ΟΔΟΣ", "οδος"),
        ("Straße", "STRASSE"),
        ("\u1e9b\u0323", "\u017f\u0323\u0307"),
    ],
)
def test_names_are_compared_without_case_spaces_and_the_way_accents_are_encoded(one, other):
    assert folded(one) == folded(other)


@given(st.text())
def test_folding_again_changes_nothing(text):
    assert folded(folded(text)) == folded(text)
    assert folded(unicodedata.normalize("NFD", text)) == folded(unicodedata.normalize("NFC", text))


@given(st.text(st.characters()))
def test_what_is_shown_has_no_character_that_a_terminal_obeys(text):
    shown = visible(text)
    assert len(shown) == len(text)
    shown.encode("utf-8")  # raises for a lone surrogate
    controls = {c for c in shown if unicodedata.category(c) == "Cc"}
    assert controls <= {"\t", "\n"}
    assert all(new == old for new, old in zip(shown, text, strict=True) if old.isprintable())


def test_escapes_are_shown_as_characters():
    assert visible("\x1b[31mred\x9b0m\u202e\udcfc") == "\u241b[31mred\ufffd0m\ufffd\ufffd"


def test_json_and_toml_are_read_through_it():
    assert json.loads(decode('\ufeff{"a": "ü"}'.encode("utf-16-be"))) == {"a": "ü"}
    assert tomllib.loads(decode(b"\xef\xbb\xbflr = 1e-4")) == {"lr": 1e-4}
