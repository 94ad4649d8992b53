"""What two sets of pairs have in common, byte for byte."""

import tarfile

import pytest

from clipft.data.captions.table import NoCaptions
from clipft.data.overlap import same_images, shared_images
from clipft.data.shards.folders import open_pairs
from clipft.embedding import encoding
from tests.conftest import add


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Three validation images, of which training has one and another of the same size in bytes."""
    folder = tmp_path_factory.mktemp("sides")
    for split, images in (
        ("val", (b"a" * 10, b"b" * 10, b"c" * 9)),
        ("train", (b"a" * 10, b"d" * 10)),
    ):
        (folder / split).mkdir()
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for number, image in enumerate(images):
                add(tar, f"{number}.jpg", image)
                add(tar, f"{number}.txt", b"a chair")
    return open_pairs(folder / "val"), open_pairs(folder / "train")


def test_equal_images_are_counted(sides):
    assert shared_images(*sides) == 1


def test_images_of_equal_size_and_end_are_compared_in_full(tmp_path):
    same, other = b"a" * 100 + b"e" * 64, b"b" * 100 + b"e" * 64
    for split, images in (("val", (same, other)), ("train", (same, same, b"c" * 164))):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for number, image in enumerate(images):
                add(tar, f"{number}.jpg", image)
                add(tar, f"{number}.txt", b"a chair")
    val, train = open_pairs(tmp_path / "val"), open_pairs(tmp_path / "train")
    assert shared_images(val, train) == 1
    assert same_images(val).tolist() == [0, 1]
    assert same_images(train).tolist() == [0, 0, 2]
    assert train.image_end(2, 3) == b"ccc"
    assert train.image_end(2, 1000) == b"c" * 164


def test_images_that_are_too_many_to_read_are_not_called_different(sides):
    assert shared_images(*sides, most_read=4) == 1
    assert shared_images(*sides, most_read=3) is None


def test_a_run_says_that_shared_images_were_not_counted(sides, monkeypatch):
    val, train = sides
    captions = (NoCaptions(), NoCaptions())
    (counted,) = encoding.data_remarks(train, val, captions, 77)
    assert counted.startswith("training also has the image of 1 of 3 validation pairs")
    monkeypatch.setattr(encoding, "shared_images", lambda *_: None)
    (uncounted,) = encoding.data_remarks(train, val, captions, 77)
    assert uncounted.startswith("clipft did not count the validation images")
