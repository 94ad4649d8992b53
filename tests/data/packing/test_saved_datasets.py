"""Data sets as the library ``datasets`` writes them: its folders, its types, its columns."""

import json
import shutil

import pytest

from clipft.core.errors import UsageError
from tests.data.packing.pack_helpers import metadata_of, packed, pattern
from tests.data.packing.test_layouts import captions

datasets = pytest.importorskip("datasets")
COLORS = ["oak", "walnut", "white"]


def table(numbers, image="image", **more):
    features = {
        image: datasets.Image(),
        "caption": datasets.Value("string"),
        "wood": datasets.ClassLabel(names=COLORS),
        "tags": datasets.List(datasets.ClassLabel(names=COLORS)),
    }
    columns = {
        image: [pattern(n) for n in numbers],
        "caption": [f"thing {n}" for n in numbers],
        "wood": [n % 3 for n in numbers],
        "tags": [[0, n % 3] for n in numbers],
    }
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name, values in more.items():
        made = made.add_column(name, values)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """With a split of its own. Read only."""
    folder = tmp_path_factory.mktemp("saved") / "data"
    splits = {"train": range(12), "validation": range(20, 24), "test": range(30, 33)}
    made = {split: table(numbers) for split, numbers in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder), num_shards={"train": 2})
    return folder


def test_a_saved_data_set_keeps_its_splits_and_its_labels_have_names(saved, tmp_path):
    result = packed(saved, tmp_path / "out")
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (12, 4, 3)
    assert captions(tmp_path / "out" / "val") == [f"thing {n}" for n in range(20, 24)]
    found = metadata_of(tmp_path / "out" / "train")
    assert found["thing 5"] == {"wood": "white", "tags": ["oak", "white"]}
    assert not result.skipped and not result.not_read.endings


def test_captions_can_be_made_of_labels(saved, tmp_path):
    packed(saved / "train", tmp_path / "out", caption="a chair of {wood}", val_share=0.2)
    train, val = (captions(tmp_path / "out" / split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(f"a chair of {COLORS[n % 3]}" for n in range(12))


def test_the_caches_of_datasets_are_not_packed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "data")
    part = folder / "train" / "data-00000-of-00002.arrow"
    shutil.copy(part, part.with_name("cache-0123456789abcdef.arrow"))
    result = packed(folder, tmp_path / "out")
    assert (result.train_pairs, result.not_read.endings["arrow"]) == (12, 1)


def test_one_table_keeps_the_split_that_it_was_taken_from(tmp_path):
    for split in ("test", "train"):
        made = table(range(8))
        made.info.splits = None
        made._split = datasets.Split(split)
        made.save_to_disk(str(tmp_path / split))
        state = json.loads((tmp_path / split / "state.json").read_text())
        assert state["_split"] == split
    shutil.move(tmp_path / "test", tmp_path / "one")  # the folder no longer tells
    shutil.copytree(tmp_path / "train", tmp_path / "two" / "a")
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "b")
    result = packed(tmp_path / "two", tmp_path / "out", val_share=0.25)
    assert (result.train_pairs, result.val_pairs, result.test_pairs) == (6, 2, 8)


def test_an_image_column_is_known_by_its_type(tmp_path):
    table(range(10), image="pixels").save_to_disk(str(tmp_path / "data"))
    assert packed(tmp_path / "data", tmp_path / "out", val_share=0.2).train_pairs == 8
    table(range(10), image="pixels").to_parquet(str(tmp_path / "train-00000.parquet"))
    found = packed(tmp_path / "train-00000.parquet", tmp_path / "other", val_share=0.2)
    assert found.train_pairs == 8


def several(numbers):
    made = table(numbers).remove_columns(["caption", "tags"])
    for place in range(2):
        made = made.add_column(f"caption_{place}", [f"{n} said {place}" for n in numbers])
    return made


def test_numbered_columns_are_captions_of_one_image(tmp_path):
    several(range(10)).to_parquet(str(tmp_path / "data.parquet"))
    result = packed(tmp_path / "data.parquet", tmp_path / "out", val_share=0.2)
    assert (result.train_pairs, result.captions) == (8, 20)
    texts = captions(tmp_path / "out" / "train") + captions(tmp_path / "out" / "val")
    assert "3 said 0\n3 said 1" in texts


def test_several_columns_can_be_named(tmp_path):
    made = several(range(10)).rename_columns({"caption_0": "de", "caption_1": "en"})
    made.to_parquet(str(tmp_path / "data.parquet"))
    source, out = tmp_path / "data.parquet", tmp_path / "out"
    result = packed(source, out, caption_column="en, de", val_share=0.2)
    assert result.captions == 20
    texts = captions(out / "train") + captions(out / "val")
    assert "3 said 1\n3 said 0" in texts
    with pytest.raises(UsageError, match=r"has no column en,fr"):
        packed(source, tmp_path / "other", caption_column="en,fr")


def test_a_list_of_sentences_as_coco_has_them(tmp_path):
    numbers = range(10)
    sentences = [[{"raw": f"one {n}", "id": 1}, {"raw": f"two {n}", "id": 2}] for n in numbers]
    made = table(numbers).remove_columns(["caption", "tags"]).add_column("sentences", sentences)
    made.to_parquet(str(tmp_path / "data.parquet"))
    packed(tmp_path / "data.parquet", tmp_path / "out", val_share=0.2)
    texts = captions(tmp_path / "out" / "train") + captions(tmp_path / "out" / "val")
    assert "one 3\ntwo 3" in texts
