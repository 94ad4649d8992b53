"""Lists the members of a tar and the positions of their bytes, without reading the bytes.

The plain tars that WebDataset's writers make (ustar headers, possibly after a pax record of times
and owners) are parsed here, several times as fast as by ``tarfile``. A tar with anything else in it
(long names, links, sparse files, a wrong checksum) is parsed by ``tarfile`` as a whole.
"""

import os
import re
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_END_OF_TAR = bytes(BLOCK)
_READ = 1 << 16
_USTAR, _GNU = b"ustar\x0000", b"ustar  \x00"
_OCTAL = re.compile(rb" *([0-7]+)[ \x00]*")
# Records of a pax header that change neither the name nor the size of the next member
_HARMLESS_RECORD = re.compile(rb"(\d+) (mtime|atime|ctime|uid|gid|uname|gname)=")
# Mode, owner, group, time and device in their usual format. They are not used here, but tarfile
# refuses a header in which one of them is not a number, so this parser must not accept it.
_SHORT = rb"(?:[0-7]{7}[ \x00]|[0-7]{6} \x00|\x00{8})"
_UNUSED = re.compile(rb"(?s).{100}" + 3 * _SHORT + rb".{12}[0-7]{11}[ \x00].{181}" + 2 * _SHORT)


class Member(NamedTuple):
    """A member of a tar. ``kind`` is "file", "folder" or "other"; ``offset`` and ``size`` of its
    content are in bytes."""

    name: str
    kind: str
    offset: int
    size: int


def read_members(path: Path) -> list[Member]:
    """Return all members in the order of the tar.

    Raises:
        tarfile.TarError, EOFError: The file is not a complete, uncompressed tar.
        OSError: The file cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        members = plain_members(file)
    finally:
        os.close(file)
    return tarfile_members(path) if members is None else members


def plain_members(file: int) -> list[Member] | None:
    """Parse the headers of an open plain tar; None if it contains anything for ``tarfile``."""
    members: list[Member] = []
    at, end = 0, os.fstat(file).st_size
    while True:
        # One read for a pax header, its records and the header of the member itself
        blocks = os.pread(file, 3 * BLOCK, at)
        header = blocks[:BLOCK]
        if header == _END_OF_TAR:
            following = next_archive(file, at)
            if following is None:
                return members
            at = following
            continue
        size = _stated_size(header)
        if size is None:
            return None
        if header[156:157] == b"x":
            records, position = blocks[BLOCK : BLOCK + size], 0
            while position < len(records):
                record = _HARMLESS_RECORD.match(records, position)
                if not record or not int(record[1]):
                    return None
                position += int(record[1])
            if size > BLOCK or position != len(records):
                return None
            at, header = at + 2 * BLOCK, blocks[2 * BLOCK :]
            size = _stated_size(header)
        if size is None:
            return None
        magic, prefix = header[257:265], header[345:500].partition(b"\0")[0]
        # GNU tar stores other data in the field of the prefix
        if magic != _USTAR and not (magic == _GNU and not any(header[345:500])):
            return None
        name = header[:100].partition(b"\0")[0]
        kind = {b"0": "file", b"5": "folder"}.get(header[156:157])
        if not name or not kind or (size if kind == "folder" else name.endswith(b"/")):
            return None
        offset = at + BLOCK
        if offset + size > end:
            return None
        text = (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")
        members.append(Member(text.rstrip("/"), kind, offset, size))
        at = offset + -(-size // BLOCK) * BLOCK


def next_archive(file: int, end: int) -> int | None:
    """Return the start of a tar that was appended after the ``end`` of another one, as by ``cat``;
    None if only zeros follow, which pad every tar."""
    while block := os.pread(file, _READ, end):
        zeros = len(block) - len(block.lstrip(b"\0"))
        if zeros < len(block):
            return end + zeros // BLOCK * BLOCK
        end += len(block)
    return None


def _stated_size(header: bytes) -> int | None:
    """Return the size of the member if the header is complete and plain and its checksum right."""
    if len(header) < BLOCK:
        return None
    checksum, size = _OCTAL.fullmatch(header[148:156]), _OCTAL.fullmatch(header[124:136])
    if not checksum or not size or not _UNUSED.match(header):
        return None
    # The checksum is computed as if its own field held eight spaces
    if int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    return int(size[1], 8)


def tarfile_members(path: Path) -> list[Member]:
    """List the members with ``tarfile``, which knows every variant of the format.

    Raises:
        tarfile.TarError: The file is not a complete, uncompressed tar.
    """
    members: list[Member] = []
    start: int | None = 0
    try:
        with path.open("rb") as file:
            while start is not None:
                end = _list_archive(file, start, members)
                start = next_archive(file.fileno(), end)
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        # Absurd sizes and thousands of nested pax headers raise these errors
        raise tarfile.ReadError(f"damaged header: {error}") from error
    return members


def _list_archive(file: BinaryIO, start: int, members: list[Member]) -> int:
    """Add the members of the tar that begins at ``start``, and return where it ends.

    Raises:
        tarfile.TarError: It is not a complete, uncompressed tar.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if info.size < 0:  # tarfile would go back by this size and loop forever
                raise ValueError(f"{info.size} bytes in {info.name}")
            kind = "folder" if info.isdir() else "other"
            if info.isreg() and not info.issparse():
                kind = "file"
            members.append(Member(info.name, kind, info.offset_data, info.size))
        # tarfile stops at a truncated or damaged header just as at the end of a tar; only the block
        # where it stopped shows which it was
        file.seek(tar.offset)
        if file.read(BLOCK) != _END_OF_TAR:
            raise tarfile.ReadError(f"truncated or damaged at byte {tar.offset}")
        return tar.offset


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``size`` bytes of the file ``path`` from ``offset`` on; -1 means up to the end of the file.

    The path is a string, which takes a fifth of the memory of a ``Path``: a catalogue has millions.
    """

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int = -1) -> bytes:
        """Return the bytes.

        Raises:
            OSError: They cannot be read, or there are more than ``limit`` or fewer than ``size``.
        """
        # Opening a pipe would wait for a writer
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
