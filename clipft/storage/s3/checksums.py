"""Is it the object? By its ETag, where that says something of the bytes.

An object that was put in one piece has its md5 as ETag, one put in parts the md5 of the
parts' md5s and their number (``...-6``); with keys of KMS or the customer it is neither.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from io import BufferedReader, BytesIO
from pathlib import Path

PART_BYTES = 16 << 20
"""Parts of an upload: also what is held of one file at a time, four times."""

BinaryFile = BufferedReader | BytesIO
"""A file to read from: of the disk, or of bytes at hand."""

_PLAIN = re.compile(r'"?([0-9a-f]{32})"?')
_PARTED = re.compile(r'"?([0-9a-f]{32})-(\d+)"?')
_MIB = 1 << 20
_USUAL_PARTS = tuple(n * _MIB for n in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512))
_USUAL_PARTS += tuple(n * 1_000_000 for n in (5, 10, 25, 50, 100))


def plain_md5(etag: str) -> str | None:
    """The md5 that an ETag is, if it has the form of one."""
    found = _PLAIN.fullmatch(etag)
    return found[1] if found else None


def md5_of(body: bytes | memoryview) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def etag_of(file: BinaryFile, size: int, part_bytes: int) -> str:
    """The ETag of a file that is put in parts of ``part_bytes``; its md5 where it is one."""
    file.seek(0)
    if size <= part_bytes:
        return f'"{hashlib.file_digest(file, _md5).hexdigest()}"'
    digests = [_md5(part).digest() for part in _parts(file, part_bytes)]
    return f'"{_md5(b"".join(digests)).hexdigest()}-{len(digests)}"'


def matches(path: Path, size: int, etag: str, first_part: Callable[[], int]) -> bool | None:
    """Whether a file has the bytes that ``etag`` stands for; None: it cannot be told.

    ``first_part`` asks the server for the size of the first part, 0 where it does not say.
    """
    with open(path, "rb") as file:
        if plain_md5(etag):
            return etag_of(file, size, size) == f'"{plain_md5(etag)}"'
        parted = _PARTED.fullmatch(etag)
        if not parted:
            return None
        wanted, parts = f'"{parted[1]}-{parted[2]}"', int(parted[2])
        if parts == 1:
            digest = hashlib.file_digest(file, _md5).digest()
            return f'"{_md5(digest).hexdigest()}-1"' == wanted
        fitting = [p for p in _USUAL_PARTS if (parts - 1) * p < size <= parts * p]
        if any(etag_of(file, size, part) == wanted for part in fitting):
            return True
        part = first_part()
        if part in {0, *fitting} or not (parts - 1) * part < size <= parts * part:
            return False if part in fitting else None
        return etag_of(file, size, part) == wanted


def _parts(file: BinaryFile, part_bytes: int) -> Iterator[bytes]:
    while part := file.read(part_bytes):
        yield part


def _md5(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
