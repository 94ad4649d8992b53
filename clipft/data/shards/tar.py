"""The members of a tar and where their bytes lie, without reading those bytes.

What WebDataset's writers make (plain ustar headers, at most a pax record of times and
owners before them) is read here, several times as fast as ``tarfile`` does. Anything else,
long names, links, sparse files, a checksum that does not fit, is left to ``tarfile`` for the
whole shard.
"""

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
_ENDED = bytes(BLOCK)
_USTAR, _GNU = b"ustar\x0000", b"ustar  \x00"
_PAX_RECORD = re.compile(rb"(\d+) (mtime|atime|ctime|uid|gid|uname|gname)=")
_OCTAL = re.compile(rb" *([0-7]+)[ \x00]*")
_SHORT = rb"(?:[0-7]{7}[ \x00]|[0-7]{6} \x00|\x00{8})"
_UNUSED = re.compile(rb"(?s).{100}" + 3 * _SHORT + rb".{12}[0-7]{11}[ \x00].{181}" + 2 * _SHORT)
"""Mode, owner, group, time, device as is usual: not wanted here, but ``tarfile`` refuses a header
where one of them is no number."""
_READ = 3 * BLOCK  # a pax header, its records and the member's own header


class Member(NamedTuple):
    """``kind``: file, folder or other. ``offset`` and ``size`` of the content in bytes."""

    name: str
    kind: str
    offset: int
    size: int


def read_members(path: Path) -> list[Member]:
    """All members in their order.

    Raises:
        tarfile.TarError, EOFError: not a whole, uncompressed tar.
        OSError: the file cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        members = _plain_members(file)
    finally:
        os.close(file)
    return _any_members(path) if members is None else members


def _plain_members(file: int) -> list[Member] | None:
    """None: there is something in it that ``tarfile`` must look at."""
    members: list[Member] = []
    at, end = 0, os.fstat(file).st_size
    while True:
        blocks = os.pread(file, _READ, at)
        header = blocks[:BLOCK]
        if header == _ENDED:
            return members
        size = _size(header)
        if size is None:
            return None
        if header[156:157] == b"x":
            if size > BLOCK or not _harmless(blocks[BLOCK : BLOCK + size]):
                return None
            at, header = at + 2 * BLOCK, blocks[2 * BLOCK :]
            size = _size(header)
        member = None if size is None else _member(header, at + BLOCK, size)
        if member is None or member.offset + member.size > end:
            return None
        members.append(member)
        at = member.offset + -(-member.size // BLOCK) * BLOCK


def _size(header: bytes) -> int | None:
    """The size that a whole header of usual numbers with a right checksum states."""
    if len(header) < BLOCK:
        return None
    checksum, size = _OCTAL.fullmatch(header[148:156]), _OCTAL.fullmatch(header[124:136])
    if not checksum or not size or not _UNUSED.match(header):
        return None
    if int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    return int(size[1], 8)


def _harmless(records: bytes) -> bool:
    """Only times and owners: nothing that changes the name, the size or the meaning."""
    at = 0
    while at < len(records):
        record = _PAX_RECORD.match(records, at)
        if not record or not int(record[1]):
            return False
        at += int(record[1])
    return at == len(records)


def _member(header: bytes, offset: int, size: int) -> Member | None:
    magic, prefix = header[257:265], header[345:500].partition(b"\0")[0]
    if magic != _USTAR and not (magic == _GNU and not any(header[345:500])):
        return None
    name = header[:100].partition(b"\0")[0]
    kind = {b"0": "file", b"5": "folder"}.get(header[156:157])
    if not name or not kind or (size if kind == "folder" else name.endswith(b"/")):
        return None
    whole = prefix + b"/" + name if prefix else name
    text = whole.decode("utf-8", "surrogateescape")
    return Member(text.rstrip("/"), kind, offset, size)


def _any_members(path: Path) -> list[Member]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(_tarfile_members(tar))
            _check_end(tar)
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise tarfile.ReadError(f"damaged header: {error}") from error  # absurd sizes and depths
    return members


def _tarfile_members(tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if info.size < 0:  # tarfile would go back by it, again and again
            raise ValueError(f"{info.size} bytes in {info.name}")
        kind = "folder" if info.isdir() else "other"
        if info.isreg() and not info.issparse():
            kind = "file"
        yield Member(info.name, kind, info.offset_data, info.size)


def _check_end(tar: tarfile.TarFile) -> None:
    """A cut or damaged header ends tarfile's reading like a proper end does: tell them apart."""
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != _ENDED:
        raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``size`` bytes of ``path`` from ``offset``; -1: all up to its end. A catalogue has
    millions of these: the path is text, a fifth of a ``Path``."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int = -1) -> bytes:
        """The bytes.

        Raises:
            OSError: they cannot be read, are more than ``limit``, or fewer than ``size``.
        """
        # Opening a pipe would wait for its writer
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise OSError(None, "not a regular file")
        with open(self.path, "rb", buffering=0) as file:
            size = self.size if self.size >= 0 else os.fstat(file.fileno()).st_size
            if 0 <= limit < size:
                raise OSError(None, f"more than {limit >> 20} MiB")
            file.seek(self.offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(None, "became shorter while it was read")
        return data
