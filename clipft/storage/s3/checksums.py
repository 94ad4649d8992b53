"""Tell from what a server says about an object whether bytes are those of it.

The ETag of an object that was uploaded in one request is its md5. One that was uploaded in parts
has the md5 of the parts' md5s and their number (``...-6``). With KMS or customer keys the ETag
says nothing about the bytes.

Newer servers also keep a checksum, which a HEAD request asks for. Most are those of the whole
object; a ``COMPOSITE`` one is a checksum of the checksums of the parts, whose sizes are not known.
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
"""Size of a part of an upload. As many are held in memory as are on their way at a time."""

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


def possible_parts(size: int, etag: str) -> list[int]:
    """The usual sizes of parts that an object of ``size`` bytes with this ETag can have had."""
    found = _IN_PARTS.fullmatch(etag)
    count = int(found[2]) if found else 0
    return [part for part in _USUAL_PARTS if (count - 1) * part < size <= count * part]


def matches(
    file: BinaryFile, size: int, etag: str, first_part: Callable[[], int] = lambda: 0
) -> bool | None:
    """Whether a file has the bytes that ``etag`` identifies; None if that cannot be told.

    The size of the parts is not in the ETag: the usual sizes are tried first, then
    ``first_part`` asks the server for the size of the first part (0 if it does not say).
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
        # Before there was a type, a composite one ended in the number of parts, as an ETag does
        text = head.get(f"Checksum{algorithm}")
        if text and "-" not in text:
            with suppress(binascii.Error):
                return Checksum(algorithm, base64.b64decode(text, validate=True))
    return None


def has_checksum(file: BinaryFile, checksum: Checksum) -> bool | None:
    """Whether the checksum is that of a file; None if the algorithm is not installed."""
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
"""Those that S3 has, in the order in which they are looked for, as ``head_object`` names them.
Each gives a new running digest, or None if it is not installed."""

QUICK = ("CRC32", "CRC32C", "CRC64NVME")
"""Those that take less processor time than an md5."""
