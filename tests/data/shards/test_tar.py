"""The fast parser of tar headers finds what tarfile finds, or leaves the tar to it."""

import io
import os
import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipft.data.shards.tar import plain_members, read_members, tarfile_members


def quick(path):
    file = os.open(path, os.O_RDONLY)
    try:
        return plain_members(file)
    finally:
        os.close(file)


NAMES = st.text(st.sampled_from("ab./é_ "), min_size=1, max_size=160)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
MEMBERS = st.tuples(NAMES, KINDS, st.binary(max_size=1200), st.sampled_from([0, 7, 1.5]))
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])


@given(st.lists(MEMBERS, max_size=5), FORMATS)
def test_the_parser_finds_the_members_that_tarfile_finds(tmp_path_factory, members, form):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, data, mtime in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = kind, mtime
            info.size = len(data) if info.isreg() else 0
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # this format cannot say it
                return
    seen = quick(path)
    assert seen is None or seen == tarfile_members(path)


def test_what_webdataset_writes_needs_no_tarfile(tmp_path):
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:  # times with fractions: pax
        tar.write({"__key__": "dir/a", "jpg": b"1" * 700, "txt": b"x", "json": b"{}"})
    seen = quick(tmp_path / "a.tar")
    sizes = {member.name: member.size for member in seen}
    assert sizes == {"dir/a.jpg": 700, "dir/a.txt": 1, "dir/a.json": 2}
    assert seen == tarfile_members(tmp_path / "a.tar")


@pytest.mark.parametrize("summed", [False, True])
@given(st.integers(0, 511), st.integers(1, 255))
@example(102, ord("0") ^ ord("8"))  # of the mode, which nobody wants
def test_a_changed_byte_in_a_header_is_left_to_tarfile(tmp_path_factory, summed, at, change):
    """``summed``: with the checksum of the changed header."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(path.read_bytes())
    data[at] ^= change
    if summed:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    try:
        truth = tarfile_members(path)
    except tarfile.TarError:
        truth = None
    seen = quick(path)
    assert seen is None or seen == truth


def test_a_truncated_tar_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3000
        tar.addfile(info, io.BytesIO(bytes(3000)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(tarfile.TarError):
        read_members(path)


@given(st.lists(st.lists(MEMBERS, max_size=3), min_size=2, max_size=3), FORMATS)
def test_joined_tars_have_the_members_of_all(tmp_path_factory, archives, form):
    folder = tmp_path_factory.mktemp("tar")
    names, data = [], b""
    for members in archives:
        with tarfile.open(folder / "a.tar", "w", format=form) as tar:
            for name, kind, content, _ in members:
                info = tarfile.TarInfo(name)
                info.type, info.size = kind, len(content) if kind in REGULAR else 0
                try:
                    tar.addfile(info, io.BytesIO(content))
                except ValueError:  # this format cannot say it
                    return
        data += (folder / "a.tar").read_bytes()
        try:
            names += [member.name for member in read_members(folder / "a.tar")]
        except tarfile.TarError:  # a folder with content, say
            return
    (folder / "all.tar").write_bytes(data)
    assert [member.name for member in read_members(folder / "all.tar")] == names
    assert [member.name for member in tarfile_members(folder / "all.tar")] == names
