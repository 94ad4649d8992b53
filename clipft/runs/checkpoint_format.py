"""The bytes of a checkpoint: a zip file of torch whose comment is the SHA-256 of all before it.

The checksum shows whether a file is complete and unaltered. The CRC-32 values of a zip file are not
enough: they cover the records but not the bytes between them, and torch does not even compare them.
``torch.load`` and all zip tools ignore the comment. The layout is:

    all that torch wrote, without its last two bytes (the length of the comment, which is 0)
    uint16 78, "clipft sha256 ", 64 hexadecimal digits: the SHA-256 of what torch wrote
"""

import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

FORMAT_VERSION = 3
_MARK = b"clipft sha256 "
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = b"\0\0"
_CHUNK = 1 << 20


class Damaged(Exception):
    """The file is not as it was written; the text says which check failed."""


@dataclass
class _HashingWriter:
    """The file-like object that ``torch.save`` writes to, with the methods that it needs.

    Without a file it only counts the bytes. An error is stored in ``error`` and not raised, because
    torch turns an exception in a writer into an unrelated message, or ends the process.
    """

    file: IO[bytes] | None = None
    size: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.file and not self.error:
            try:
                _write_all(self.file, data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None: ...


def _write_all(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data).cast("B")
    while left:  # an unbuffered file may take only a part
        left = left[file.write(left) :]


def checkpoint_size(content: dict[str, Any]) -> int:
    """Return how many bytes ``write_file`` would write, without writing any."""
    import torch

    counter = _HashingWriter()
    torch.save({**content, "format_version": FORMAT_VERSION}, cast("IO[bytes]", counter))
    return counter.size + _COMMENT


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with its format and checksum, and read the file back to verify it.

    Raises:
        OSError: The disk is full, refuses to write, or returns other bytes than were written. The
            text of the first two says how many bytes were needed.
    """
    import torch

    # Unbuffered, so that an error is raised by the write that caused it
    with path.open("wb", buffering=0) as file:
        writer = _HashingWriter(file)
        torch.save({**content, "format_version": FORMAT_VERSION}, cast("IO[bytes]", writer))
        try:
            if writer.error:
                raise writer.error
            file.seek(-len(_NO_COMMENT), os.SEEK_END)
            comment = _MARK + writer.digest.hexdigest().encode()
            _write_all(file, _COMMENT.to_bytes(2, "little") + comment)
        except OSError as error:
            reason = f"{error.strerror}, {writer.size:,} bytes were needed"
            raise OSError(error.errno, reason) from error
    try:
        check_file(path)
    except Damaged as damage:
        raise OSError(f"the disk returned other bytes than were written: {damage}") from damage


def check_file(path: Path) -> bool:
    """Check that a file has the bytes it was written with, and return True if it has a checksum.

    A file of format 1 has none: then the CRC-32 of each record is checked. The same happens to a
    file whose end was cut off.

    Raises:
        Damaged: It is not a zip file of uncompressed records, or its bytes were altered.
        OSError: It cannot be read.
    """
    has_checksum = _verify_checksum(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # torch never compresses; a crafted file could expand until memory runs out
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise Damaged("it has compressed records, which torch never writes")
            broken = None if has_checksum else archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Damaged(" ".join(str(error).split())) from error
    if broken:
        raise Damaged(f"the CRC-32 of {broken} is not the one it was written with")
    return has_checksum


def _verify_checksum(path: Path) -> bool:
    """Compare the checksum at the end of the file, and return False if there is none.

    Raises:
        Damaged: The checksum is not that of the bytes before it.
    """
    left = path.stat().st_size - _COMMENT - len(_NO_COMMENT)
    if left < 0:
        return False
    with path.open("rb") as file:
        file.seek(left)
        length, comment = file.read(len(_NO_COMMENT)), file.read()
        if length != _COMMENT.to_bytes(2, "little") or not comment.startswith(_MARK):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(min(_CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
    digest.update(_NO_COMMENT)
    if comment.removeprefix(_MARK) != digest.hexdigest().encode():
        raise Damaged("its SHA-256 is not the one it was written with")
    return True


class Weight:
    """Replaces tensors and other objects of torch in the result of ``read_values``."""

    def __init__(self, *given: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _ValuesUnpickler(pickle.Unpickler):
    """Reads plain values without imports. Objects of torch become a ``Weight``."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.partition(".")[0] == "torch":
            return Weight
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")

    def persistent_load(self, identity: Any) -> Any:
        return None  # the numbers of a tensor are in a record of their own


def read_values(path: Path) -> Any:
    """Read what a checkpoint holds besides the numbers of its tensors, without importing torch.

    Returns None for a file that cannot be read in this way; ``torch.load`` may say why. The bytes
    are not verified.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
            if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED:
                return None
            with archive.open(found[0]) as file:
                return _ValuesUnpickler(file).load()
    except MemoryError:
        raise
    except Exception:  # the unpickler may raise anything on foreign bytes
        return None
