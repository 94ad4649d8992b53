"""Packing several captions for an image: lines, lists in tables, and the split."""

import json
from pathlib import Path

import pytest

from clipft.data.shards.folders import open_pairs
from tests.data.packing.pack_helpers import packed, pattern, write_pair, write_table


def captions_in(folder: Path) -> dict[str, bytes]:
    pairs = open_pairs(folder)
    return {pairs[number].key: pairs[number].caption for number in range(len(pairs))}


def test_the_lines_of_a_txt_stay_captions_of_their_own_or_are_joined(tmp_path):
    for number in range(3):
        write_pair(tmp_path / "raw" / f"{number}.png", number, f"first {number}\n\nsecond\nthird\n")
    apart = packed(tmp_path / "raw", tmp_path / "apart", val_share=0)
    joined = packed(tmp_path / "raw", tmp_path / "joined", val_share=0, caption_lines="joined")
    assert (apart.train_pairs, apart.captions) == (3, 9)
    assert (joined.train_pairs, joined.captions) == (3, 3)
    assert captions_in(tmp_path / "apart" / "train")["1"] == b"first 1\n\nsecond\nthird\n"
    assert captions_in(tmp_path / "joined" / "train")["1"] == b"first 1 second third"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_list_of_captions_in_a_table_is_stored_as_lines(suffix, tmp_path):
    rows = []
    for number in range(3):
        pattern(number).save(tmp_path / f"{number}.png")
        captions = [f"first {number}", "second\n  line", None, ""]
        rows.append({"image": f"{number}.png", "caption": captions})
    write_table(tmp_path / f"t.{suffix}", rows)
    options = {"val_share": 0, "caption_lines": "joined"}  # is about .txt files alone
    result = packed(tmp_path / f"t.{suffix}", tmp_path / "out", **options)
    assert (result.train_pairs, result.captions, result.skipped) == (3, 6, {})
    assert captions_in(tmp_path / "out" / "train")["2"] == b"first 2\nsecond line"


def test_a_cell_of_text_is_one_caption_however_many_lines_it_has(tmp_path):
    pattern(1).save(tmp_path / "1.png")
    write_table(tmp_path / "t.csv", [{"image": "1.png", "caption": "an\r\noak\ntable"}])
    assert packed(tmp_path / "t.csv", tmp_path / "out", val_share=0).captions == 1
    assert captions_in(tmp_path / "out" / "train") == {"1": b"an oak table"}


def test_pairs_that_share_any_caption_stay_in_one_split(tmp_path):
    for number in range(12):  # a chain: each shares one caption with the next
        write_pair(tmp_path / "raw" / f"{number}.png", number, f"link {number}\nlink {number + 1}")
    write_pair(tmp_path / "raw" / "x.png", 20, "another")
    for number in range(30, 50):
        write_pair(tmp_path / "raw" / f"{number}.png", number, f"own {number}\nmine {number}")
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0.4)
    assert (result.captions, result.shared_captions) == (65, 0)
    links = [
        caption.startswith(b"link") for caption in captions_in(tmp_path / "out" / "val").values()
    ]
    assert links.count(True) in (0, 12)


def test_a_caption_of_all_images_does_not_keep_them_in_one_split(tmp_path):
    for number in range(20):  # two images of each product, with the same captions
        captions = f"product {number // 2}\nseen from the front\nsomething to buy"
        write_pair(tmp_path / "raw" / f"{number}.png", number, captions)
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0.2)
    assert (result.train_pairs, result.val_pairs) == (16, 4)
    assert result.shared_captions == 4  # which pack says
    products = {caption.splitlines()[0] for caption in captions_in(tmp_path / "out/val").values()}
    assert len(products) == 2


def test_captions_in_a_json_are_packed_without_a_txt(tmp_path):
    for number, metadata in enumerate(
        (["one", "two"], {"caption": ["three", "four\nmore"]}, {"caption": "five"}, {"id": 7}, [])
    ):
        path = tmp_path / "raw" / f"{number}.png"
        write_pair(path, number, None, json.dumps(metadata))
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    assert captions_in(tmp_path / "out" / "train") == {
        "0": b"one\ntwo",
        "1": b"three\nfour more",
        "2": b"five",
    }
    assert (result.captions, result.skipped) == (5, {"no caption": 2})
