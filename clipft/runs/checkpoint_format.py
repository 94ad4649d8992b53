"""The bytes of a checkpoint: a zip of torch whose comment is the SHA-256 of all before it.

So a file is whole or not, whoever wrote it to which disk, and no bit of it is left out: the
CRC-32 that a zip has of its records says nothing of what lies between them, and torch compares
not even those. ``torch.load`` and every zip tool pass the comment over.

    all that torch wrote, without its last two bytes (the length of the comment: 0)
    uint16 78, "clipft sha256 ", 64 hexadecimal digits: the SHA-256 of what torch wrote
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

_MARK = b"clipft sha256 "
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = b"\0\0"
_PIECE = 1 << 20


class Damaged(Exception):
    """A file is not as it was written; the text says which check failed."""


class _Counted:
    """What ``torch.save`` writes to: it asks for no more than these two."""

    size = 0

    def write(self, data: bytes) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None: ...


class _HashedFile(_Counted):
    """After an error it only counts: torch answers one that is raised into it with riddles, or
    ends the process."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                _write_all(self._file, data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return super().write(data)


def file_size(content: dict[str, Any]) -> int:
    """Bytes that ``write_file`` would write; nothing is written."""
    counted = _Counted()
    torch.save(content, cast("IO[bytes]", counted))
    return counted.size + _COMMENT


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with its checksum and read it back.

    Raises:
        OSError: the disk is full or refuses, or gives back other bytes; its text says how many
            bytes were wanted.
    """
    with path.open("wb", buffering=0) as file:  # an error of a write is that write's
        hashed = _HashedFile(file)
        torch.save(content, cast("IO[bytes]", hashed))
        try:
            if hashed.error:
                raise hashed.error
            file.seek(-len(_NO_COMMENT), os.SEEK_END)
            sealed = _COMMENT.to_bytes(2, "little") + _MARK + hashed.digest.hexdigest().encode()
            _write_all(file, sealed)
        except OSError as error:
            wanted = f"{error.strerror}, {hashed.size:,} bytes were wanted"
            raise OSError(error.errno, wanted) from error
    try:
        check_file(path)
    except Damaged as damage:
        raise OSError(f"the disk gave back other bytes than it was given: {damage}") from damage


def _write_all(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def has_checksum(path: Path) -> bool:
    """Does it end with one? A file of format 1, or one that was cut, does not."""
    return _stated(path) is not None


def check_file(path: Path) -> None:
    """
    Raises:
        Damaged: it is no zip of stored records, or not the bytes that were written.
        OSError: it cannot be read.
    """
    stated = _stated(path)
    if stated is not None and _digest(path) != stated:
        raise Damaged("its SHA-256 is not the one it was written with")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise Damaged("it has compressed records, which torch never writes")
            broken = None if stated is not None else archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Damaged(" ".join(str(error).split())) from error
    if broken:
        raise Damaged(f"the CRC-32 of {broken} is not the one it was written with")


def _stated(path: Path) -> str | None:
    if path.stat().st_size < _COMMENT + len(_NO_COMMENT):
        return None
    with path.open("rb") as file:
        file.seek(-_COMMENT - len(_NO_COMMENT), os.SEEK_END)
        end = file.read()
    length, comment = end[:2], end[2:]
    if length != _COMMENT.to_bytes(2, "little") or not comment.startswith(_MARK):
        return None
    return comment.removeprefix(_MARK).decode("ascii", "replace")


def _digest(path: Path) -> str:
    left, digest = path.stat().st_size - _COMMENT - len(_NO_COMMENT), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(min(_PIECE, left)):
            digest.update(piece)
            left -= len(piece)
    digest.update(_NO_COMMENT)
    return digest.hexdigest()
