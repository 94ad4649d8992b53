import itertools
import json
import tarfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.core.errors import DataError
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from clipft.data.shards.stream import open_stream
from tests.conftest import add


def write(folder, sizes):
    folder.mkdir(exist_ok=True)
    number = itertools.count()
    for which, size in enumerate(sizes):
        with tarfile.open(folder / f"{which:02d}.tar", "w") as tar:
            add(tar, "notes.md", b"of another tool")
            for _ in range(size):
                n = next(number)
                add(tar, f"{n}.jpg", b"image %d" % n)
                add(tar, f"{n}.txt", b"words %d" % n)
            add(tar, f"lonely{which}.jpg", b"no words")
    return folder


def numbers(stream, plan, start=None, epochs=2):
    batches = plan.from_position(start or Position(), epochs, stream.order(plan))
    return [[(epoch, pair.number) for epoch, pair in batch] for batch in batches]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    buffer=st.integers(1, 12),
    effective=st.integers(2, 9),
    micro=st.integers(1, 9),
    data=st.data(),
)
def test_each_pair_once_an_epoch_and_resumed_is_the_tail(
    tmp_path_factory, sizes, buffer, effective, micro, data
):
    stream = open_stream(write(tmp_path_factory.mktemp("s"), sizes), buffer)
    plan = EpochPlan(len(stream), effective, micro, seed=5)
    whole = numbers(stream, plan)
    flat = [place for batch in whole for place in batch]
    assert sorted(flat) == [(e, n) for e in range(2) for n in range(sum(sizes))]
    position = Position(data.draw(st.integers(0, 1)), data.draw(st.integers(0, plan.steps - 1)))
    tail = numbers(stream, plan, position)
    assert tail == whole[len(whole) - len(tail) :]
    assert tail[0][0] == flat[position.epoch * len(stream) + plan.bounds[position.step][0]]


def test_a_stream_gives_the_same_pairs_as_the_index(tmp_path):
    folder = write(tmp_path / "s", [5, 3])
    indexed, stream = open_pairs(folder), open_stream(folder, 4)
    assert len(stream) == len(indexed)
    assert [s.key for s in stream.skipped] == [s.key for s in indexed.skipped]
    for pair in stream.order(EpochPlan(8, 4, 4, 1))(0, 0):
        assert pair == indexed[pair.number]


def test_a_key_that_is_not_utf_8_is_the_same_as_in_the_index(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for name in ("caf\udce9.jpg", "caf\udce9.txt", "b.jpg", "b.txt"):
            add(tar, name, b"x")
    indexed, stream = open_pairs(tmp_path), open_stream(tmp_path, 4)
    keys = {p.number: p.key for p in stream.order(EpochPlan(2, 2, 2, 1))(0, 0)}
    assert keys == {0: indexed[0].key, 1: indexed[1].key} == {0: "caf\ufffd", 1: "b"}


def test_order_changes_with_seed_and_epoch_and_mixes_shards(tmp_path):
    stream = open_stream(write(tmp_path / "s", [20, 20, 20]), 40)
    orders = {
        tuple(p.number for p in stream.order(EpochPlan(60, 8, 8, seed))(epoch, 0))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    for order in orders:
        assert len({number // 20 for number in order[:12]}) > 1


def test_a_limit_takes_the_first_pairs(tmp_path):
    folder = write(tmp_path / "s", [5, 3, 4])
    stream = open_stream(folder, 4, limit=7)
    assert sorted(p.number for p in stream.order(EpochPlan(7, 4, 4, 1))(0, 0)) == list(range(7))


def test_sizes_beside_the_shards_spare_the_counting(tmp_path):
    folder = write(tmp_path / "s", [5, 3])
    (folder / "sizes.json").write_text(json.dumps({"00.tar": 5, "01.tar": 3}))
    assert len(open_stream(folder, 4)) == 8
    assert not list(folder.glob(".*index"))


@pytest.mark.parametrize("text", ["{", "[]", '{"00.tar": "x"}', '{"00.tar": -1}'])
def test_broken_sizes_are_named(tmp_path, text):
    folder = write(tmp_path / "s", [5])
    (folder / "sizes.json").write_text(text)
    with pytest.raises(DataError, match=r"sizes.json"):
        open_stream(folder, 4)


def drain(stream):
    return list(stream.order(EpochPlan(len(stream), 4, 4, 1))(0, 0))


def test_fewer_pairs_than_promised_is_an_error(tmp_path):
    folder = write(tmp_path / "s", [5])
    (folder / "sizes.json").write_text('{"00.tar": 6}')
    with pytest.raises(DataError, match=r"gave 5 pairs in sequence, but 6 were expected"):
        drain(open_stream(folder, 4))


def test_a_pair_whose_files_are_apart_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "b.txt", "a.txt"):
            add(tar, name, b"x")
    with pytest.raises(DataError, match=r"gave 1 pair in sequence, but 2 were expected"):
        drain(open_stream(tmp_path, 4))


def test_a_shard_that_is_truncated_meanwhile_is_an_error(tmp_path):
    folder = write(tmp_path / "s", [50])
    stream = open_stream(folder, 4)
    shard = folder / "00.tar"
    shard.write_bytes(shard.read_bytes()[:10_000])
    with pytest.raises(DataError, match=r"00.tar"):
        drain(stream)


def test_the_reading_thread_ends_with_its_reader(tmp_path):
    before, others = threading.active_count(), set(threading.enumerate())
    pairs = open_stream(write(tmp_path / "s", [50]), 4).order(EpochPlan(50, 4, 4, 1))(0, 0)
    next(pairs)
    assert threading.active_count() == before + 1
    pairs.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(2)
    assert threading.active_count() == before


@pytest.mark.parametrize("place", ["pipe:cat x", "s3://bucket/train", "http://host/{0..9}.tar"])
def test_urls_and_commands_are_not_accepted_as_folders(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        open_stream(type(tmp_path)(place), 4)
