"""A local folder that mirrors a prefix, and its journal: what was brought or sent, and how
the file looked then.

A record is written only when its file is on the disk: after a power cut the journal vouches
for no file whose bytes were lost.
"""

import ctypes
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from clipft.core.errors import StorageError
from clipft.core.files import disk_error, replacing
from clipft.storage.s3.checksums import etag_of, plain_md5
from clipft.storage.s3.keys import OWN_PREFIX, Refused, RefusedKey, RemoteObject, parents

JOURNAL = f"{OWN_PREFIX}sync.jsonl"
LOCK = f"{OWN_PREFIX}sync.lock"
PART = f"{OWN_PREFIX}part-"


@dataclass
class Folder:
    """What belongs in ``path``, and what the journal says of what is there."""

    path: Path
    objects: list[RemoteObject]
    refused: list[Refused]
    records: dict[str, list[Any]] = field(default_factory=dict)
    _new: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def _root(self) -> str:
        return f"{self.path}/"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder made and locked, its journal read, and at last written whole.

        Raises:
            StorageError: it cannot be written, or another sync is at it.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = _lock_file(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    f"another sync is writing to {self.path}", "wait until it has ended"
                ) from error
            self.load()
            try:
                yield
            finally:
                self.flush()

    def remove_stale_parts(self, kept: set[str]) -> None:
        """What broken-off syncs left, but those of ``kept``."""
        for part in self.path.glob(f"{PART}*"):
            if part.stem not in kept:
                part.unlink(missing_ok=True)

    def load(self) -> None:
        """Later lines win; a line that a kill cut off counts as none."""
        with suppress(OSError, UnicodeDecodeError):
            for line in (self.path / JOURNAL).read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.records[str(entry["path"])] = list(entry["state"])

    def flush(self) -> None:
        """Everything so far on the disk, then in the journal."""
        if not self._new:
            return
        try:
            flush_files(self.path, list(self._new))
            lines = (_line(name, record) for name, record in self._new.items())
            with open(self.path / JOURNAL, "a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(self.path / JOURNAL, error) from error
        self.records |= self._new
        self._new = {}

    def forget(self, names: list[str]) -> None:
        """Drop records, and the journal's superseded lines with them."""
        self.flush()
        for name in names:
            self.records.pop(name, None)
        with replacing(self.path / JOURNAL) as temporary:
            lines = "".join(_line(name, record) for name, record in self.records.items())
            temporary.write_text(lines, encoding="utf-8")

    def record(self, wanted: RemoteObject) -> None:
        """To be told when the file is in its place."""
        self._new[wanted.path] = _state(wanted.etag, os.lstat(self.place(wanted)))

    def place(self, wanted: RemoteObject) -> str:
        return f"{self._root}{wanted.path}"

    def status(self, wanted: RemoteObject) -> os.stat_result | None:
        """Of a regular file that is reached without any link inside the folder."""
        status = self._lstat(wanted)
        return status if status and stat.S_ISREG(status.st_mode) else None

    def _lstat(self, wanted: RemoteObject) -> os.stat_result | None:
        """Of whatever is in an object's place, but not behind a link."""
        folder = wanted.folder
        if folder and any(os.path.islink(self._root + parent) for parent in parents(wanted.path)):
            return None
        try:
            return os.lstat(self.place(wanted))
        except OSError:
            return None

    def has(self, wanted: RemoteObject) -> bool:
        """Whether the file is as a sync left it, and the object as it was then."""
        record = self.records.get(wanted.path)
        if record is None:
            return False
        status = self.status(wanted)
        return (
            status is not None
            and status.st_size == wanted.size
            and record == _state(wanted.etag, status)
        )

    def needs(self, wanted: RemoteObject) -> bool:
        """Whether the object has to be brought: not where the file in its place has its md5.
        The way to its place is made.

        Raises:
            RefusedKey: something else is in its way.
        """
        status, md5 = self._lstat(wanted), plain_md5(wanted.etag)
        if status is None:
            self._make_way(wanted)
            return True
        if stat.S_ISDIR(status.st_mode):
            raise RefusedKey(f"{wanted.path} in the target is a folder")
        if not stat.S_ISREG(status.st_mode) or status.st_size != wanted.size or md5 is None:
            return True
        with open(self.place(wanted), "rb") as file:
            return etag_of(file, wanted.size, wanted.size) != f'"{md5}"'

    def _make_way(self, wanted: RemoteObject) -> None:
        """Make the folders of an object, following no link and taking nobody's place."""
        for parent in parents(wanted.path):
            path = self._root + parent
            if os.path.islink(path):
                raise RefusedKey(f"{parent} in the target is a link")
            try:
                os.mkdir(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise RefusedKey(f"{parent} in the target is a file") from None

    def bytes_short(self, wanted: RemoteObject) -> int:
        status = self.status(wanted)
        return wanted.size - (status.st_size if status else 0)


def _line(name: str, record: list[Any]) -> str:
    return json.dumps({"path": name, "state": record}, ensure_ascii=False) + "\n"


def _state(etag: str, status: os.stat_result) -> list[Any]:
    return [etag, status.st_size, status.st_mtime_ns]


def _lock_file(folder: Path) -> IO[str]:
    return open(folder / LOCK, "a")


def flush_files(folder: Path, names: list[str]) -> None:
    """Bytes and names of files on the disk.

    One ``syncfs`` where there is one (Linux): one flush for thousands of small files, not
    thousands; it reports what could not be written. Elsewhere ``fsync`` of each.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syncfs(descriptor):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return
        for name in names:
            with suppress(FileNotFoundError), open(folder / name, "rb") as file:
                os.fsync(file.fileno())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OWN_SUFFIX = ".clipft-index"


def local_files(folder: Path) -> list[str]:
    """Paths of files below ``folder``, with slashes, sorted; none where there is no folder.

    A link to a file counts as that file, a link to a folder is not followed.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_own(name)]
        below = os.path.relpath(parent, folder)
        for name in names:
            if not _is_own(name) and os.path.isfile(os.path.join(parent, name)):
                found.append(name if below == "." else f"{below}/{name}".replace(os.sep, "/"))
    return sorted(found)


def remove_files(folder: Path, names: list[str]) -> None:
    """Remove files and then the folders that this leaves empty; never ``folder`` itself.

    Raises:
        StorageError: the disk refuses.
    """
    for name in names:
        path = folder / name
        try:
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()
        except OSError as error:
            raise disk_error(path, error) from error


def _is_own(name: str) -> bool:
    return name.startswith(OWN_PREFIX) or name.endswith(_OWN_SUFFIX)
