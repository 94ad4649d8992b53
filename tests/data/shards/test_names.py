"""Names of members: one key up to the first or the last dot, and the files that are passed over."""

import io
import subprocess
import tarfile

import pytest

from clipft.cli.app import run
from clipft.core.errors import DataError
from clipft.data.shards.folders import open_pairs, shard_paths
from clipft.data.shards.index import index_shard
from clipft.data.shards.names import parse_name
from clipft.data.shards.stream import open_stream
from clipft.data.shards.tar import read_members
from clipft.search.images import open_images


def write_tar(path, *names):
    """Write members whose content is their own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return path


def contents(folder):
    """The pairs of a folder as (key, image, caption, metadata), by number and as a stream."""
    pairs = open_pairs(folder)
    indexed = [pairs[number] for number in range(len(pairs))]
    streamed = list(open_stream(folder, 1000)._in_sequence(1, 0, 0))
    assert streamed == indexed
    return [(p.key, p.image.decode(), p.caption.decode(), p.metadata.decode()) for p in indexed]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (
            ["1.image.jpg", "1.caption.txt", "1.meta.json"],
            [("1", "1.image.jpg", "1.caption.txt", "1.meta.json")],
        ),
        (["1.jpg", "1.caption.txt"], [("1", "1.jpg", "1.caption.txt", "")]),
        (["1.image.jpg", "1.json"], [("1", "1.image.jpg", "", "1.json")]),
        # A name that only differs after a dot is a pair of its own, as it always was
        (["v1.02.jpg", "v1.02.txt"], [("v1.02", "v1.02.jpg", "v1.02.txt", "")]),
        (
            ["a.left.jpg", "a.left.txt", "a.right.jpg", "a.right.txt"],
            [
                ("a.left", "a.left.jpg", "a.left.txt", ""),
                ("a.right", "a.right.jpg", "a.right.txt", ""),
            ],
        ),
        (["a.b/1.x.JPG", "a.b/1.y.txt"], [("a.b/1", "a.b/1.x.JPG", "a.b/1.y.txt", "")]),
        # A mask beside a complete pair does not spoil it
        (["1.jpg", "1.txt", "1.mask.png"], [("1", "1.jpg", "1.txt", "")]),
        (["1.jpg", "1.txt", "1.meta.json"], [("1", "1.jpg", "1.txt", "1.meta.json")]),
        (["._1.jpg", "1.jpg", "1.txt", "__MACOSX/._1.txt"], [("1", "1.jpg", "1.txt", "")]),
    ],
)
def test_members_are_paired_by_either_key(tmp_path, names, pairs):
    write_tar(tmp_path / "a.tar", *names)
    assert contents(tmp_path) == pairs


@pytest.mark.parametrize(
    ("names", "reasons"),
    [
        (
            ["1.image.jpg", "1.mask.png", "1.caption.txt"],
            ["several image files with one key (image, mask)"],
        ),
        (
            ["1.jpg", "1.a.txt", "1.b.txt"],
            ["several caption files with one key (a, b)"],
        ),
        # Numbers between dots are no fields: these are not the image and the caption of one thing
        (["v1.0.jpg", "v1.1.txt"], ["no caption", "no image"]),
        (["sofa 1.5m.jpg", "sofa 1.6m.txt"], ["no caption", "no image"]),
        (["1.jpg", "1.txt", "1.mask.png"], ["a second image with the same key"]),
    ],
)
def test_members_that_are_not_paired_are_named(tmp_path, names, reasons):
    shard = index_shard(write_tar(tmp_path / "a.tar", *names))
    assert [skipped.reason for skipped in shard.skipped] == reasons


def test_shards_without_pairs_say_what_their_members_are(tmp_path):
    write_tar(tmp_path / "a.tar", "1.image.jpg", "1.mask.png", "1.caption.txt")
    with pytest.raises(DataError) as caught:
        open_pairs(tmp_path)
    assert "1 x several image files with one key (image, mask)" in caught.value.message
    assert "1.image.jpg, 1.mask.png, 1.caption.txt" in caught.value.message
    assert "first dot" in caught.value.hint


@pytest.mark.parametrize("name", ["._a.jpg", "dir/._a.jpg", ".hidden.txt", "a.exe", "jpg", ".jpg"])
def test_other_files_belong_to_no_pair(name):
    assert parse_name(name) is None


def test_the_files_that_macos_adds_are_passed_over(tmp_path, capsys):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", "a.jpg", "a.txt")
        (tmp_path / split / "._0.tar").write_bytes(b"\0\x05\x16\x07" + bytes(100))
        assert [path.name for path in shard_paths(tmp_path / split)] == ["0.tar"]
        assert len(open_stream(tmp_path / split, 10)) == 1
    assert [part.count for part in open_images(tmp_path)] == [1, 1]
    assert run(["doctor", "--model", "tiny", "--data-dir", str(tmp_path), "--json"]) in {0, 10}
    assert "1 for train and 1 for val" in capsys.readouterr().out


def joined(tmp_path, *parts):
    path = tmp_path / "train" / "all.tar"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_tars_joined_by_cat_are_read_to_their_end(tmp_path):
    one = write_tar(tmp_path / "one.tar", "a.jpg", "a.txt")
    subprocess.run(
        ["tar", "-cf", "two.tar", "--format=gnu", "b.jpg", "b.txt"],
        cwd=_files(tmp_path, "b.jpg", "b.txt"),
        check=True,
    )
    joined(tmp_path, one, tmp_path / "two.tar", one.with_name("one.tar"))
    assert [key for key, *_ in contents(tmp_path / "train")] == ["a", "b"]
    # tarfile finds the same
    assert [m.name for m in read_members(tmp_path / "train" / "all.tar")] == [
        *("a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt")
    ]


def _files(folder, *names):
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_what_follows_a_tar_and_is_none_is_refused(tmp_path):
    one = write_tar(tmp_path / "one.tar", "a.jpg", "a.txt")
    (tmp_path / "junk").write_bytes(b"not a header" * 100)
    joined(tmp_path, one, tmp_path / "junk")
    with pytest.raises(DataError, match="truncated or damaged at byte 10240"):
        open_pairs(tmp_path / "train")
