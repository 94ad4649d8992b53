import gzip
import io
import tarfile

import pytest

from clipft.core.errors import DataError
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import open_pairs
from clipft.data.shards.index import index_shard
from tests.conftest import add


def shard(path, members, **more):
    with tarfile.open(path, "w", **more) as tar:
        for name, data in members:
            add(tar, name, data)
    return index_shard(path)


def test_pairs_come_back_as_they_lie_in_the_shard(tmp_path):
    long = "x" * 180
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = [
            ("b.txt", b"second"),
            ("b.JPG", b"IMAGE2"),
            ("./dir/a.jpeg", b"IMAGE1"),
            ("./dir/a.txt", b"first"),
            ("./dir/a.json", b'{"type": "chair"}'),
            (f"{long}.png", b"IMAGE3"),
            (f"{long}.txt", b"third"),
            ("1.5m table.webp", b"IMAGE4"),
            ("1.5m table.txt", b"fourth"),
        ]
        dataset = PairDataset([shard(tmp_path / "a.tar", members, format=form)])
        pairs = [(dataset[i].image, dataset[i].caption) for i in range(len(dataset))]
        assert pairs == [
            (b"IMAGE2", b"second"),
            (b"IMAGE1", b"first"),
            (b"IMAGE3", b"third"),
            (b"IMAGE4", b"fourth"),
        ]
        assert dataset.metadata(1) == {"type": "chair"}
        assert dataset.metadata(0) == {}


def test_members_that_make_no_pair_are_listed_by_key(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("b.txt", b"1"),
        ("c.jpg", b"1"),
        ("c.txt", b"1"),
        ("c.txt", b"2"),
        (".hidden.jpg", b"1"),
        ("readme.md", b"1"),
    ]
    found = shard(tmp_path / "a.tar", members)
    assert [found.key(row) for row in range(len(found))] == ["c"]
    reasons = {(s.key, s.reason) for s in found.skipped}
    assert reasons == {
        ("a", "no caption"),
        ("b", "no image"),
        ("c.txt", "a second caption with the same key"),
    }


def test_links_devices_and_names_that_climb_touch_nothing(tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("d.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            tar.addfile(info)
        add(tar, "l.txt", b"x")
        for name in ("../../up.jpg", "../../up.txt", "/abs.jpg", "/abs.txt"):
            add(tar, name, b"inside the tar")
    found = index_shard(tmp_path / "a.tar")
    assert {s.reason for s in found.skipped if s.key.endswith("jpg")} == {"not a regular file"}
    dataset = PairDataset([found])
    assert {dataset[i].image for i in range(len(dataset))} == {b"inside the tar"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "secret.txt"]


@pytest.mark.parametrize(
    "harm", ["empty", "gzip", "html", "cut in the data", "cut in a header", "a flipped bit"]
)
def test_a_file_that_is_not_a_complete_tar_is_named(tmp_path, harm):
    path = tmp_path / "00007.tar"
    shard(path, [("a.jpg", b"x" * 3000), ("a.txt", b"x"), ("b.jpg", b"y" * 3000), ("b.txt", b"y")])
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "gzip": gzip.compress(data),
            "html": b"<html>" * 100,
            "cut in the data": data[:2000],
            "cut in a header": data[: 512 * 9 + 100],
            "a flipped bit": data[: 512 * 9 + 3] + b"#" + data[512 * 9 + 4 :],
        }[harm]
    )
    with pytest.raises(DataError, match=r"00007\.tar"):
        index_shard(path)


def test_a_shard_that_is_replaced_while_in_use_is_noticed(tmp_path):
    dataset = PairDataset([shard(tmp_path / "a.tar", [("a.jpg", b"x" * 900), ("a.txt", b"x")])])
    (tmp_path / "a.tar").write_bytes(b"short")
    with pytest.raises(DataError, match="changed or removed"):
        dataset[0]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="changed or removed"):
        dataset[0]


def test_shards_are_numbered_through_and_can_be_limited(tmp_path):
    for number, count in enumerate((3, 0, 2)):
        members = [
            (f"{i}.{kind}", b"%d%d" % (number, i)) for i in range(count) for kind in ("jpg", "txt")
        ]
        shard(tmp_path / f"{number}.tar", members)
    whole = open_pairs(tmp_path)
    assert [whole[i].image for i in range(len(whole))] == [b"00", b"01", b"02", b"20", b"21"]
    assert len(open_pairs(tmp_path, limit=4)) == 4
    assert len(open_pairs(tmp_path, limit=99)) == 5
    assert whole.identity() != open_pairs(tmp_path, limit=4).identity()


def test_folders_without_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_pairs(tmp_path / "none")
    with pytest.raises(DataError, match="found nothing"):
        open_pairs(tmp_path)
    shard(tmp_path / "a.tar", [("a.jpg", b"x")])
    with pytest.raises(DataError, match="no pair"):
        open_pairs(tmp_path)


def test_members_are_read_from_a_tar_with_other_sizes_of_header(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "k.jpg", b"abc")
        add(tar, "k.txt", b"def")
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert PairDataset([index_shard(tmp_path / "a.tar")])[0].caption == b"def"
