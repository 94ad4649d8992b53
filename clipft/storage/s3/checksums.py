"""Check by ETag or checksum whether bytes are those of an object.

The ETag of an object that was uploaded in one request is its md5. If it was uploaded in parts, the
ETag is the md5 of the parts' md5s and the number of parts (``...-6``). With KMS or customer keys
the ETag says nothing about the bytes.

Newer servers also store a checksum, which a HEAD request returns. Most checksums cover the whole
object. A ``COMPOSITE`` one is a checksum of the checksums of the parts, whose sizes are not known.
"""

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BufferedReader, BytesIO
from typing import Any, NamedTuple, Protocol

PART_BYTES = 16 << 20
"""Size in bytes of a part of an upload. All parts that are being sent are in memory."""

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
    """Return an md5 object, even if OpenSSL does not allow md5 for security."""
    return hashlib.md5(data, usedforsecurity=False)


def etag_of(file: BinaryFile, size: int, part_bytes: int) -> str:
    """The quoted ETag that a file of ``size`` bytes gets if uploaded in parts of ``part_bytes``."""
    file.seek(0)
    if size <= part_bytes:
        return f'"{hashlib.file_digest(file, md5).hexdigest()}"'
    digests = [md5(part).digest() for part in iter(lambda: file.read(part_bytes), b"")]
    return f'"{md5(b"".join(digests)).hexdigest()}-{len(digests)}"'


def possible_parts(size: int, etag: str) -> list[int]:
    """Return the common part sizes that would give an object of ``size`` bytes this ETag."""
    found = _IN_PARTS.fullmatch(etag)
    count = int(found[2]) if found else 0
    return [part for part in _USUAL_PARTS if (count - 1) * part < size <= count * part]


def matches(
    file: BinaryFile, size: int, etag: str, first_part: Callable[[], int] = lambda: 0
) -> bool | None:
    """Return whether a file has the bytes that ``etag`` identifies; None if that is unknown.

    The size of the parts is not in the ETag. The usual sizes are tried first, then the size that
    ``first_part`` gets from the server (0 if the server does not say).
    """
    if plain_md5(etag):
        return etag_of(file, size, size) == f'"{plain_md5(etag)}"'
    in_parts = _IN_PARTS.fullmatch(etag)
    if not in_parts:
        return None
    wanted, parts = f'"{in_parts[1]}-{in_parts[2]}"', int(in_parts[2])
    if parts == 1:
        file.seek(0)
        digest = hashlib.file_digest(file, md5).digest()
        return f'"{md5(digest).hexdigest()}-1"' == wanted
    possible = possible_parts(size, etag)
    if any(etag_of(file, size, part) == wanted for part in possible):
        return True
    part = first_part()
    if part in {0, *possible} or not (parts - 1) * part < size <= parts * part:
        return False if part in possible else None
    return etag_of(file, size, part) == wanted


class Checksum(NamedTuple):
    """A checksum of a whole object: the name of its algorithm, such as ``CRC64NVME``, and its
    bytes."""

    algorithm: str
    value: bytes


def checksum_in(head: Mapping[str, Any]) -> Checksum | None:
    """The checksum of the whole object in the answer to ``head_object`` with ``ChecksumMode``."""
    if head.get("ChecksumType") == "COMPOSITE":
        return None
    for algorithm in ALGORITHMS:
        # Older composite checksums have no type but end in the number of parts, as an ETag does
        text = head.get(f"Checksum{algorithm}")
        if text and "-" not in text:
            with suppress(binascii.Error):
                return Checksum(algorithm, base64.b64decode(text, validate=True))
    return None


def has_checksum(file: BinaryFile, checksum: Checksum) -> bool | None:
    """Return whether a file has this checksum; None if the algorithm is not installed."""
    running = ALGORITHMS[checksum.algorithm]()
    if running is None:
        return None
    file.seek(0)
    for block in iter(lambda: file.read(_MIB), b""):
        running.update(block)
    return running.digest() == checksum.value


class Running(Protocol):
    """A digest of bytes that arrive one after the other."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class RunningEtag:
    """The ETag of bytes that arrive one after the other, if uploaded in parts of ``part_bytes``
    (0: in one request)."""

    def __init__(self, part_bytes: int = 0) -> None:
        self._part_bytes, self._left = part_bytes, part_bytes
        self._md5, self._parts = md5(), list[bytes]()

    def update(self, data: bytes | memoryview, /) -> None:
        data = memoryview(data)
        while self._part_bytes and len(data) >= self._left:
            self._md5.update(data[: self._left])
            self._parts.append(self._md5.digest())
            data, self._left, self._md5 = data[self._left :], self._part_bytes, md5()
        self._md5.update(data)
        self._left -= len(data)

    def etag(self) -> str:
        if not self._part_bytes:
            return f'"{self._md5.hexdigest()}"'
        parts = list(self._parts)
        if self._left < self._part_bytes:
            parts.append(self._md5.digest())
        return f'"{md5(b"".join(parts)).hexdigest()}-{len(parts)}"'


class _Crc:
    def __init__(self, function: Callable[[bytes | memoryview, int], int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


def _crt(name: str, size: int) -> _Crc | None:
    """A CRC of awscrt, which computes some GB/s; in Python it would take minutes for one."""
    try:
        from awscrt import checksums
    except ImportError:
        return None
    return _Crc(getattr(checksums, name), size)


ALGORITHMS: dict[str, Callable[[], Running | None]] = {
    "CRC32": lambda: _Crc(zlib.crc32, 4),
    "SHA256": lambda: hashlib.sha256(usedforsecurity=False),
    "SHA1": lambda: hashlib.sha1(usedforsecurity=False),
    "CRC64NVME": lambda: _crt("crc64nvme", 8),
    "CRC32C": lambda: _crt("crc32c", 4),
}
"""The checksum algorithms of S3 by their names in ``head_object``, in the order in which they are
tried. Each function returns a new running digest, or None if the algorithm is not installed."""

QUICK = ("CRC32", "CRC32C", "CRC64NVME")
"""The algorithms that take less processor time than an md5."""
