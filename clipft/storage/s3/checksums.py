"""Tell from an ETag whether bytes are those of an object.

The ETag of an object that was uploaded in one request is its md5. One that was uploaded in parts
has the md5 of the parts' md5s and their number (``...-6``). With KMS or customer keys the ETag
says nothing about the bytes.
"""

import hashlib
import re
from collections.abc import Callable
from io import BufferedReader, BytesIO
from pathlib import Path

PART_BYTES = 16 << 20
"""Size of a part of an upload. Four parts of a file are held in memory at a time."""

BinaryFile = BufferedReader | BytesIO

_PLAIN = re.compile(r'"?([0-9a-f]{32})"?')
_IN_PARTS = re.compile(r'"?([0-9a-f]{32})-(\d+)"?')
_MIB = 1 << 20
_USUAL_PARTS = tuple(n * _MIB for n in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512))
_USUAL_PARTS += tuple(n * 1_000_000 for n in (5, 10, 25, 50, 100))


def plain_md5(etag: str) -> str | None:
    """The md5 in an ETag, or None if the ETag does not have the form of one."""
    found = _PLAIN.fullmatch(etag)
    return found[1] if found else None


def md5(data: bytes | memoryview = b"") -> "hashlib._Hash":
    """An md5 that also works where OpenSSL allows it for nothing that concerns security."""
    return hashlib.md5(data, usedforsecurity=False)


def etag_of(file: BinaryFile, size: int, part_bytes: int) -> str:
    """The quoted ETag that a file of ``size`` bytes gets if uploaded in parts of ``part_bytes``."""
    file.seek(0)
    if size <= part_bytes:
        return f'"{hashlib.file_digest(file, md5).hexdigest()}"'
    digests = [md5(part).digest() for part in iter(lambda: file.read(part_bytes), b"")]
    return f'"{md5(b"".join(digests)).hexdigest()}-{len(digests)}"'


def matches(path: Path, size: int, etag: str, first_part: Callable[[], int]) -> bool | None:
    """Whether a file has the bytes that ``etag`` identifies; None if that cannot be told.

    The size of the parts is not in the ETag: the usual sizes are tried first, then
    ``first_part`` asks the server for the size of the first part (0 if it does not say).
    """
    with open(path, "rb") as file:
        if plain_md5(etag):
            return etag_of(file, size, size) == f'"{plain_md5(etag)}"'
        in_parts = _IN_PARTS.fullmatch(etag)
        if not in_parts:
            return None
        wanted, parts = f'"{in_parts[1]}-{in_parts[2]}"', int(in_parts[2])
        if parts == 1:
            digest = hashlib.file_digest(file, md5).digest()
            return f'"{md5(digest).hexdigest()}-1"' == wanted
        possible = [p for p in _USUAL_PARTS if (parts - 1) * p < size <= parts * p]
        if any(etag_of(file, size, part) == wanted for part in possible):
            return True
        part = first_part()
        if part in {0, *possible} or not (parts - 1) * part < size <= parts * part:
            return False if part in possible else None
        return etag_of(file, size, part) == wanted
