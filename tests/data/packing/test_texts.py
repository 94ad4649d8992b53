"""Captions and metadata of any encoding, packed as UTF-8 or refused by name."""

import json
import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.core.errors import DataError
from clipft.data.captions.template import clean_text
from tests.data.packing.pack_helpers import metadata_of, packed, pairs_of, write_pair

MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
OPTIONS = {"val_share": 0, "near": -1}


@settings(max_examples=20, deadline=None)
@given(
    caption=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1),
    encoding=st.sampled_from(MARKED),
)
def test_captions_and_metadata_are_packed_as_utf_8(caption, encoding, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_pair(folder / "p.png", 1)
    (folder / "p.txt").write_text(caption, encoding=encoding)
    (folder / "p.json").write_text(json.dumps({"größe": caption}), encoding=encoding)
    packed(folder, folder / "out", **OPTIONS)
    ((_, stored),) = pairs_of(folder / "out" / "train")
    assert stored.decode() == caption == clean_text(caption)
    assert list(metadata_of(folder / "out" / "train").values()) == [{"größe": caption}]


def test_captions_that_are_not_text_are_skipped_by_name(tmp_path):
    for number in range(3):
        write_pair(tmp_path / "raw" / f"{number}.png", number)
    (tmp_path / "raw" / "1.txt").write_bytes("Grüner Stuhl".encode("cp1252"))
    (tmp_path / "raw" / "2.json").write_bytes(b'{"name": "Gr\xfcner Stuhl"}')
    result = packed(tmp_path / "raw", tmp_path / "out", **OPTIONS)
    assert result.skipped == {
        "the caption is not UTF-8 text": 1,
        "the metadata is not UTF-8 text": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert [os.path.basename(line["file"]) for line in listed] == ["1.png", "2.png"]


def test_a_folder_without_readable_captions_is_refused(tmp_path):
    write_pair(tmp_path / "raw" / "1.png", 1)
    (tmp_path / "raw" / "1.txt").write_bytes(b"Gr\xfcner Stuhl")
    with pytest.raises(DataError, match="1 x the caption is not UTF-8 text") as caught:
        packed(tmp_path / "raw", tmp_path / "out")
    assert "--encoding cp1252" in caught.value.hint


def test_the_encoding_of_captions_and_metadata_can_be_named(tmp_path):
    for number, encoding in enumerate(("cp1252", "utf-16", "utf-8-sig")):
        write_pair(tmp_path / "raw" / f"{number}.png", number)
        (tmp_path / "raw" / f"{number}.txt").write_text(f"Stühle {number}", encoding=encoding)
        (tmp_path / "raw" / f"{number}.json").write_text('{"a": "ü"}', encoding=encoding)
    packed(tmp_path / "raw", tmp_path / "out", encoding="cp1252", **OPTIONS)
    found = metadata_of(tmp_path / "out" / "train")
    assert found == {f"Stühle {number}": {"a": "ü"} for number in range(3)}


@pytest.mark.parametrize(
    "others",
    [
        [unicodedata.normalize("NFD", "Stühle")] * 9,
        ["ST&Uuml;HLE"] * 9,
        ["StÃ¼hle"] * 9,
        ["Stühle\u3000"] * 9,
    ],
    ids=["decomposed", "entity", "mojibake", "wide space"],
)
def test_captions_that_read_alike_stay_in_one_split(tmp_path, others):
    for number, caption in enumerate(["Stühle", *others, *map(str, range(40))]):
        write_pair(tmp_path / "raw" / f"{number}.png", number, caption)
    packed(tmp_path / "raw", tmp_path / "out", near=-1, val_share=0.3)
    train = {caption.decode() for _, caption in pairs_of(tmp_path / "out" / "train")}
    assert ("Stühle" in train) == (others[0] in train)


def test_groups_match_however_accents_are_encoded(tmp_path):
    for number in range(60):
        name = unicodedata.normalize("NFD" if number % 2 else "NFC", f"Stühle {number % 20 // 2}")
        metadata = json.dumps({"name": name}, ensure_ascii=False)
        write_pair(tmp_path / "raw" / f"{number}.png", number, f"caption {number}", metadata)
    packed(tmp_path / "raw", tmp_path / "out", near=-1, val_share=0.3, group_field="name")
    train, val = (
        {
            unicodedata.normalize("NFC", str(found["name"]))
            for found in metadata_of(tmp_path / "out" / split).values()
        }
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_a_target_whose_name_is_not_utf_8_is_refused_before_any_work(tmp_path, capsys):
    write_pair(tmp_path / "raw" / "1.png", 1)
    target = os.fsdecode(bytes(tmp_path) + b"/K\xfcche")
    assert run(["pack", str(tmp_path / "raw"), target]) == 2
    assert "the name is not UTF-8" in capsys.readouterr().err
    assert not os.path.exists(target)


def test_a_source_whose_name_is_not_utf_8_is_packed(tmp_path, capsys):
    source = os.fsdecode(bytes(tmp_path) + b"/K\xfcche")
    os.mkdir(source)
    write_pair(tmp_path / "1.png", 1)
    for name in ("1.png", "1.txt"):
        os.rename(tmp_path / name, f"{source}/{name}")
    assert run(["pack", source, str(tmp_path / "out"), "--near", "-1"]) == 0
    assert "K\ufffdche" in capsys.readouterr().err
