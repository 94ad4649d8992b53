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
from typing import Any, NamedTuple

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


def matches(file: BinaryFile, size: int, etag: str, first_part: Callable[[], int]) -> bool | None:
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
    possible = [p for p in _USUAL_PARTS if (parts - 1) * p < size <= parts * p]
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
    digest = ALGORITHMS[checksum.algorithm](file)
    return None if digest is None else digest == checksum.value


def _crc(function: Callable[[bytes, int], int], size: int) -> Callable[[BinaryFile], bytes]:
    def digest(file: BinaryFile) -> bytes:
        file.seek(0)
        value = 0
        for block in iter(lambda: file.read(_MIB), b""):
            value = function(block, value)
        return value.to_bytes(size, "big")

    return digest


def _crt(name: str, size: int) -> Callable[[BinaryFile], bytes | None]:
    """A CRC of awscrt, which computes some GB/s; in Python it would take minutes for one."""

    def digest(file: BinaryFile) -> bytes | None:
        try:
            from awscrt import checksums
        except ImportError:
            return None
        return _crc(getattr(checksums, name), size)(file)

    return digest


def _hashed(name: str) -> Callable[[BinaryFile], bytes]:
    def digest(file: BinaryFile) -> bytes:
        file.seek(0)
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).digest()

    return digest


ALGORITHMS: dict[str, Callable[[BinaryFile], bytes | None]] = {
    "CRC32": _crc(zlib.crc32, 4),
    "SHA256": _hashed("sha256"),
    "SHA1": _hashed("sha1"),
    "CRC64NVME": _crt("crc64nvme", 8),
    "CRC32C": _crt("crc32c", 4),
}
"""Those that S3 has, in the order in which they are looked for, as ``head_object`` names them."""
