"""The index on disk is made once, and trusted only for the state of the shard that it describes."""

import os
import pickle
from pathlib import Path

import pytest

from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.index import Shard, index_places, index_shard, open_shard
from tests.data.shards.test_dataset import shard as write

MEMBERS = [("a.jpg", b"1"), ("a.txt", b"one"), ("é.png", b"22"), ("é.txt", b"two"), ("z.jpg", b"")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.tar", MEMBERS)
    return folder / "a.tar"


def version(index: Path) -> int:
    """Identify the index file: it changes whenever the index is built again."""
    return index.stat().st_ino  # the time changes whenever the index is used


def content(shard: Shard):
    return [shard.key(row) for row in range(len(shard))], shard.places.tolist(), shard.skipped


def test_a_shard_opened_again_is_read_from_its_index(path):
    first = content(open_shard(path))
    assert first == content(index_shard(path))
    assert first[0] == ["a", "é"]
    assert [s.reason for s in first[2]] == ["no caption"]
    built = version(index_places(path)[0])
    assert content(open_shard(path)) == first
    assert version(index_places(path)[0]) == built


def test_a_changed_shard_is_indexed_again(path):
    open_shard(path)
    write(path, MEMBERS[2:])
    assert content(open_shard(path))[0] == ["é"]


def test_a_touched_shard_is_indexed_again(path):
    open_shard(path)
    built = version(index_places(path)[0])
    os.utime(path, ns=(1, 1))
    open_shard(path)
    assert version(index_places(path)[0]) != built


def test_the_index_goes_to_the_cache_if_the_folder_cannot_be_written_to(path):
    beside, cached = index_places(path)
    beside.mkdir()  # nothing can be renamed to this name
    first = content(open_shard(path))
    assert cached.is_file()
    assert sorted(p.name for p in path.parent.iterdir()) == [beside.name, "a.tar"]
    built = version(cached)
    assert content(open_shard(path)) == first
    assert version(cached) == built


def test_a_shard_opens_even_if_no_index_can_be_written(path, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    index_places(path)[0].mkdir()
    assert content(open_shard(path))[0] == ["a", "é"]


@pytest.mark.parametrize("damage", ["cut", "magic", "offset", "keys", "length"])
def test_a_damaged_or_hostile_index_is_made_again(path, damage):
    good = content(open_shard(path))
    place = index_places(path)[0]
    data = bytearray(place.read_bytes())
    start = 16 + int.from_bytes(data[8:16], "little")
    if damage == "cut":
        del data[-1]
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "length":
        data[8:16] = b"\xff" * 8
    elif damage == "offset":
        data[start : start + 8] = (1 << 40).to_bytes(8, "little")
    else:
        ends = start + 2 * 3 * 2 * 8
        data[ends : ends + 8] = (99).to_bytes(8, "little")
    place.write_bytes(data)
    assert content(open_shard(path)) == good
    assert place.read_bytes() != data  # replaced by a whole one


def test_a_started_worker_gets_the_path_and_not_the_arrays(path):
    shard = open_shard(path)
    assert not shard.places.flags.owndata  # it is the map of the file
    sent = pickle.dumps(PairDataset([shard]))
    assert len(sent) < 1000
    assert pickle.loads(sent)[1].caption == b"two"
