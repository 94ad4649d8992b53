"""Faults of whole shards and of their members' names (14, 15, 16, 19 of the catalogue).

Tested elsewhere: no ``.tar`` and no folder (``e2e/test_bad_input``); what lies in PAX and GNU
long names, ``./`` and folders, keys with dots, upper-case extensions, a second caption of one
key, half pairs, names that climb (``data/test_shards``); a flipped bit in a header
(``data/test_tar_headers``); damaged indexes (``data/test_shard_index``).
"""

import gzip
import subprocess
import tarfile
from pathlib import Path

import pytest

from clipft.core.errors import DataError
from clipft.data.shards.folders import open_pairs
from clipft.data.shards.index import index_shard
from tests.faults.helpers import (
    catalogue,
    files,
    good,
    one_error,
    skipped,
    train,
    trained_pairs,
    write_tar,
)

BLOCK = tarfile.BLOCKSIZE


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def with_size(data: bytes, size: int) -> bytes:
    """Make a tar whose first header states ``size`` in GNU's base 256, with a correct checksum."""
    header = bytearray(data[:BLOCK])
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


def deep(data: bytes) -> bytes:
    """Make a tar with thousands of PAX headers before the first member."""
    record = b"18 comment=abcdef\n"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return (info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0")) * 3000 + data


HARMS = {
    "empty": lambda data: b"",
    "gzip": gzip.compress,
    "html": lambda data: b"<html>404 Not Found</html>" * 40,
    "cut-in-the-data": lambda data: data[: len(data) // 2],
    "cut-in-a-header": lambda data: data[: BLOCK // 2],
    "cut-before-the-end-mark": lambda data: data[: -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK],
    "negative-size": lambda data: with_size(data, -BLOCK),
    "huge-size": lambda data: with_size(data, 1 << 80),
    "deep": deep,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_shard_that_is_not_a_complete_tar_ends_with_3_and_its_name(tmp_path, capsys, harm):
    catalogue(tmp_path, good(range(4)))
    path = tmp_path / "train" / "00001.tar"
    write_tar(path, good(range(24)))
    path.write_bytes(HARMS[harm](path.read_bytes()))
    before = files(tmp_path)
    assert train(tmp_path) == 3
    error, hint = one_error(capsys)
    assert error.startswith(f"{path} is not a complete tar: ")
    assert "fetch the shard again" in hint
    assert files(tmp_path) == before


@pytest.mark.parametrize("blocks", [2, 20])
def test_a_tar_of_zeros_has_no_pairs(tmp_path, capsys, blocks):
    catalogue(tmp_path, [])
    (tmp_path / "train" / "00000.tar").write_bytes(bytes(blocks * BLOCK))
    assert train(tmp_path) == 3
    assert "no pair of image and caption in 1 shard of" in one_error(capsys)[0]


def test_a_folder_with_other_tars_says_what_is_there(tmp_path, capsys):
    catalogue(tmp_path, good(range(2)))
    (tmp_path / "train" / "00000.tar").rename(tmp_path / "train" / "00000.tar.gz")
    (tmp_path / "train" / "00001.TAR.part").touch()
    assert train(tmp_path) == 3
    error, hint = one_error(capsys)
    assert error == (
        f"no .tar in {tmp_path / 'train'}: found 1 .gz, 1 .part (00000.tar.gz, 00001.TAR.part)"
    )
    assert f"`gunzip {tmp_path / 'train' / '00000.tar.gz'}`" in hint


def test_an_empty_and_a_missing_val_folder_are_named(tmp_path, capsys):
    catalogue(tmp_path, good(range(4)))
    val = tmp_path / "val"
    (val / "00000.tar").unlink()
    assert train(tmp_path) == 3
    missing = f"there is no validation split: no *.tar in {val}"
    assert one_error(capsys)[0] == missing
    val.rmdir()
    assert train(tmp_path) == 3
    assert one_error(capsys)[0] == missing


def sparse_tar(path: Path, form: str) -> None:
    """Write a pair whose image GNU tar stores as a sparse file, and a complete pair."""
    folder = path.parent / form
    folder.mkdir()
    for name, data in [("s.txt", b"sparse"), *good([90])]:
        (folder / name).write_bytes(data)
    with (folder / "s.jpg").open("wb") as file:
        file.truncate(1 << 20)
    names = sorted(file.name for file in folder.iterdir())
    made = ["tar", "-C", str(folder), "--sparse", f"--format={form}", "-cf", str(path), *names]
    subprocess.run(made, check=True)


def test_other_tools_members_and_names_that_climb_do_no_harm(tmp_path):
    """One run trains on the complete pairs and lists the others."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"outside")
    catalogue(tmp_path, good(range(10)))
    odd = tmp_path / "train" / "odd.tar"
    (jpg, image), (_, caption) = good([60])
    members = [
        *(member(name, tarfile.DIRTYPE) for name in ("./", "./dir/", "folder.jpg/")),
        ("._00001.jpg", b"Mac"),
        ("__MACOSX/._00001.jpg", b"Mac"),
        ("README", b"text"),
        ("noextension", b"?"),
        (".jpg", b"no name"),
        *((f"./dir/{name}", data) for name, data in good([61])),
        *((f"../../climbs.{kind}", data) for kind, data in (("jpg", image), ("txt", caption))),
        *((f"{tmp_path}/root.{kind}", data) for kind, data in (("jpg", image), ("txt", caption))),
        member("link.jpg", tarfile.SYMTYPE, str(secret)),
        ("link.txt", b"a link"),
        *good([60]),
        member("hard.jpg", tarfile.LNKTYPE, jpg),
        ("hard.txt", b"a link within the tar"),
        *(member(f"{kind.decode()}.png", kind) for kind in b"3 4 6".split()),
        (b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), image),
    ]
    write_tar(odd, members, tarfile.GNU_FORMAT)
    for form in ("gnu", "posix"):
        sparse_tar(tmp_path / "train" / f"sparse-{form}.tar", form)
        for file in (tmp_path / "train" / form).iterdir():
            file.unlink()
    before = set(files(tmp_path))

    assert train(tmp_path) == 0
    found = skipped(tmp_path)
    listed = {
        ("odd.tar", "link.jpg"): "not a regular file",
        ("odd.tar", "link"): "no image",
        ("odd.tar", "hard.jpg"): "not a regular file",
        ("odd.tar", "hard"): "no image",
        **{("odd.tar", f"{kind}.png"): "not a regular file" for kind in (3, 4, 6)},
        ("odd.tar", "caf\ufffd"): "no caption",
        **{(f"sparse-{f}.tar", "s.jpg"): "not a regular file" for f in ("gnu", "posix")},
        **{(f"sparse-{f}.tar", "s"): "no image" for f in ("gnu", "posix")},
    }
    assert found == listed
    assert trained_pairs(tmp_path) == 10 + 4 + 2
    new = set(files(tmp_path)) - before
    assert all(name.startswith(("out/", "cache/")) for name in new)
    assert secret.read_bytes() == b"outside"


def test_one_key_in_two_shards_is_two_pairs(tmp_path):
    for number, name in enumerate(("a.tar", "b.tar")):
        write_tar(tmp_path / name, [("same.jpg", b"%d" % number), ("same.txt", b"text")])
    pairs = open_pairs(tmp_path)
    assert [(pairs[i].shard, pairs[i].key, pairs[i].image) for i in range(2)] == [
        ("a.tar", "same", b"0"),
        ("b.tar", "same", b"1"),
    ]


def test_two_images_of_one_key_are_one_pair_and_a_reason(tmp_path):
    members = [("a.jpg", b"1"), ("a.PNG", b"2"), ("a.txt", b"x"), ("A.jpg", b"3"), ("A.txt", b"y")]
    write_tar(tmp_path / "a.tar", members)
    shard = index_shard(tmp_path / "a.tar")
    assert [shard.key(row) for row in range(len(shard))] == ["a", "A"]
    assert [(s.key, s.reason) for s in shard.skipped] == [
        ("a.PNG", "a second image with the same key")
    ]


def test_a_shard_that_may_not_be_read_is_named(tmp_path, capsys):
    catalogue(tmp_path, good(range(2)))
    (tmp_path / "train" / "00001.tar").mkdir()
    (tmp_path / "train" / "00002.tar").symlink_to(tmp_path / "nowhere")
    assert train(tmp_path) == 3
    assert one_error(capsys)[0] == f"cannot read {tmp_path}/train/00001.tar: Is a directory"
    (tmp_path / "train" / "00001.tar").rmdir()
    assert train(tmp_path) == 3
    assert "00002.tar: No such file" in one_error(capsys)[0]
    with pytest.raises(DataError, match="cannot read"):
        open_pairs(tmp_path / "train")
