"""A local folder that mirrors a prefix, and its journal of the files that a sync has compared.

The journal records the ETag of each object, and the size and time of its file, whether the object
was downloaded or uploaded. A sync does not wait until the bytes are on the disk, which for large
shards can take longer than fetching them. Its records contain an id of the current boot of the
machine and are valid only until the next boot, so that after a power cut the files are checked
again by their md5. A later sync in the same boot makes the records permanent.
"""

import ctypes
import json
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError
from clipft.core.files import disk_error, replacing
from clipft.storage.s3.checksums import matches
from clipft.storage.s3.keys import OWN_PREFIX, Refused, RefusedKey, RemoteObject, parents

JOURNAL = f"{OWN_PREFIX}sync.jsonl"
LOCK = f"{OWN_PREFIX}sync.lock"
PART = f"{OWN_PREFIX}part-"
_INDEX_SUFFIX = ".clipft-index"

_WRITTEN_AFTER = 60.0
"""Seconds after which Linux has started to write a changed file to disk (30 by default)."""

Record = list[Any]
"""ETag of the object, size and time of change (ns) of the file, and the boot in which the record is
valid; without a boot it is always valid."""


@dataclass
class Folder:
    """The objects that belong in ``path``, and the journal's ``records`` of the files there."""

    path: Path
    objects: list[RemoteObject]
    refused: list[Refused]
    records: dict[str, Record] = field(default_factory=dict)
    _new: dict[str, Record] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Create and lock the folder and load its journal; at the end, flush the journal.

        Raises:
            StorageError: the folder cannot be written, or another sync is writing to it.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a")  # noqa: SIM115
        except OSError as error:
            raise disk_error(self.path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    f"another sync is writing to {self.path}", "wait until it has finished"
                ) from error
            self.load()
            try:
                yield
            finally:
                self.write_records()
                self._make_lasting()

    def load(self) -> None:
        """Read the journal. A later line replaces an earlier one; a line that was cut off when
        clipft was killed is ignored."""
        with suppress(OSError, UnicodeDecodeError):
            for line in (self.path / JOURNAL).read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.records[str(entry["path"])] = list(entry["state"])

    def record(self, wanted: RemoteObject, status: os.stat_result | None = None) -> None:
        """Note that the file and the object have the same bytes; ``write_records`` saves the note.

        ``status`` is the file's status from before it was read. By default, it is looked up now.
        """
        found = status or os.lstat(self.local(wanted))
        self._new[wanted.path] = [wanted.etag, found.st_size, found.st_mtime_ns]

    def remember(self) -> None:
        """Write the new records if the folder can be written to and no other sync does so."""
        if self._new:
            with suppress(StorageError), self.opened():
                pass

    def write_records(self) -> None:
        """Append the new records to the journal.

        Raises:
            StorageError: the disk failed.
        """
        if not self._new:
            return
        boot = current_boot()
        try:
            if boot is None:
                flush_files(self.path, list(self._new))
            else:
                self._new = {name: [*record, boot] for name, record in self._new.items()}
            self._append(self._new)
        except OSError as error:
            raise disk_error(self.path / JOURNAL, error) from error
        self.records |= self._new
        self._new = {}

    def _make_lasting(self) -> None:
        """Flush the files of an earlier sync in this boot, and make their records permanent."""
        before = time.time_ns() - int(_WRITTEN_AFTER * 1e9)
        boot = current_boot()
        lasting = {
            name: record[:3]
            for name, record in self.records.items()
            if len(record) == 4 and record[3] == boot and record[2] < before
        }
        if lasting:
            # If this fails, the files are only checked again after the next boot
            with suppress(OSError):
                flush_files(self.path, list(lasting))
                self._append(lasting)
                self.records |= lasting

    def _append(self, records: dict[str, Record]) -> None:
        with open(self.path / JOURNAL, "a", encoding="utf-8") as file:
            file.writelines(_lines(records))

    def delete(self, names: list[str]) -> None:
        """Remove files and folders that become empty, and rewrite the journal without the files.
        ``path`` itself stays.

        Raises:
            StorageError: a file cannot be removed.
        """
        for name in names:
            path = self.path / name
            self.records.pop(name, None)
            try:
                path.unlink(missing_ok=True)
                for parent in path.parents:
                    if parent == self.path or any(parent.iterdir()):
                        break
                    parent.rmdir()
            except OSError as error:
                raise disk_error(path, error) from error
        self.write_records()
        with replacing(self.path / JOURNAL) as temporary:
            temporary.write_text("".join(_lines(self.records)), encoding="utf-8")

    def local(self, wanted: RemoteObject) -> str:
        return f"{self.path}/{wanted.path}"

    def status(self, wanted: RemoteObject) -> os.stat_result | None:
        """Return the status of the file at the object's path, or None if there is none or one of
        its folders is a link."""
        if any(os.path.islink(f"{self.path}/{parent}") for parent in parents(wanted.path)):
            return None
        try:
            return os.lstat(self.local(wanted))
        except OSError:
            return None

    def has(self, wanted: RemoteObject) -> bool:
        """Return whether the file is unchanged since a sync, and the object is the same version."""
        record = self.records.get(wanted.path)
        status = self.status(wanted) if record is not None else None
        return (
            status is not None
            and stat.S_ISREG(status.st_mode)
            and status.st_size == wanted.size
            and record is not None
            and record[:3] == [wanted.etag, wanted.size, status.st_mtime_ns]
            and (len(record) == 3 or record[3] == current_boot())
        )

    def needs(self, wanted: RemoteObject) -> bool:
        """Return whether the object has to be fetched, because the file at its path does not have
        the md5 of the object or of its parts. If there is no file, its folders are created.

        Raises:
            RefusedKey: something other than a file is at the path.
        """
        status = self.status(wanted)
        if status is None:
            for parent in parents(wanted.path):
                path = f"{self.path}/{parent}"
                if os.path.islink(path):
                    raise RefusedKey(f"needs the folder {parent}, which is a link in the target")
                try:
                    os.mkdir(path)
                except FileExistsError:
                    if not os.path.isdir(path):
                        raise RefusedKey(
                            f"needs the folder {parent}, which is a file in the target"
                        ) from None
            return True
        if stat.S_ISDIR(status.st_mode):
            raise RefusedKey(f"would replace {wanted.path}, which is a folder in the target")
        if not stat.S_ISREG(status.st_mode) or status.st_size != wanted.size:
            return True
        with open(self.local(wanted), "rb") as file:
            return not matches(file, wanted.size, wanted.etag)


def _lines(records: dict[str, Record]) -> Iterable[str]:
    for name, record in records.items():
        yield json.dumps({"path": name, "state": record}, ensure_ascii=False) + "\n"


@cache
def current_boot() -> str | None:
    """Return an id that changes when the machine restarts, or None if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return None


def flush_files(folder: Path, names: list[str]) -> None:
    """Make sure that the bytes and the names of files are on disk.

    On Linux, ``syncfs`` flushes thousands of small files at once, and reports write errors. On
    other systems, ``fsync`` is called for each file.
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


def local_files(folder: Path) -> list[str]:
    """Return the sorted paths of the user's files below ``folder``, with slashes; [] if it does not
    exist.

    A link to a file counts as that file. A link to a folder is not followed.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        inside = (*folders, *names)
        own = {n for n in inside if n.startswith(OWN_PREFIX) or n.endswith(_INDEX_SUFFIX)}
        folders[:] = [name for name in folders if name not in own]  # os.walk skips the others
        below = os.path.relpath(parent, folder)
        for name in names:
            if name not in own and os.path.isfile(os.path.join(parent, name)):
                found.append(name if below == "." else f"{below}/{name}".replace(os.sep, "/"))
    return sorted(found)
