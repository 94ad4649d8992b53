"""The output folder of ``clipft embed``: its files, and how new files are moved into it.

    images/*.parquet, texts/*.parquet   a file for each part of the data
    embeddings.json                     how all of them were made; it marks a complete folder
    skipped.jsonl                       pairs that could not be embedded
    README.md                           a card with the configurations that ``datasets`` reads
    images.faiss, texts.faiss           exact indexes, if they were asked for; ``*.ids.parquet``
                                        have the keys of their rows

New files are written to a hidden folder inside the output folder, and moved when all of them are
complete. If a run is interrupted, the next run reuses the files in the hidden folder. Several
processes, on one machine or on several, can write to the same folder. They take turns through a
lock in the hidden folder: only one at a time may begin, write a file or move the files. The system
releases the lock even if its holder is killed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.core.files import check_writable, disk_error, read_json, write_json, write_text

TABLES = ("images", "texts")
OWN_FILES = ("images/*.parquet", "texts/*.parquet", "*.ids.parquet", "*.faiss", "skipped.jsonl")
"""Patterns of the files that an update may remove."""

_MARK = "embeddings.json"
_LOCK = "lock"
_MODEL = {"model", "scenario", "weights", "preprocessing"}
_ANOTHER = "name another folder"


class EmbeddingsFolder:
    """The folder ``out``; ``building`` is the hidden folder inside it."""

    def __init__(self, out: Path) -> None:
        self.out, self.building = out, out / ".clipft-building"

    def check(self) -> None:
        """Check, before anything is embedded, that ``out`` is writable and has no other files.

        Raises:
            UsageError: ``out`` is not a folder, or it has other files.
            StorageError: ``out`` cannot be written.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is not a folder", _ANOTHER)
        names = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        known = names & {_MARK, self.building.name}
        # Hidden files may belong to another process that has just begun
        if not known and any(not name.startswith(".") for name in names):
            raise UsageError(f"{self.out} is not empty, and it holds no embeddings", _ANOTHER)
        # A folder that does not exist is not created before there are files to write
        check_writable(self.out / _MARK if self.out.is_dir() else self.out)

    def begin(self, made_with: Mapping[str, Any], overwrite: bool) -> None:
        """Check that existing files were made in the same way, unless ``overwrite`` is True.

        Raises:
            UsageError: The files were made with another model or other options.
            StorageError: The disk is full, or refuses to write.
        """
        for folder in (self.building, self.out):
            there = read_json(folder / _MARK) or {}
            differing = {name for name in there if there[name] != made_with.get(name)}
            differing -= {"clipft"}  # a newer version may continue what an older one began
            if differing and not overwrite:
                raise UsageError(
                    f"{self.out} holds embeddings of {_difference(differing, there, made_with)}",
                    f"add --overwrite to make all of them again, or {_ANOTHER}",
                )
            if differing and folder == self.building:
                self.discard()
        write_json(self.building / _MARK, dict(made_with))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process changes the folder, and prevent changes during the block.

        Raises:
            StorageError: The folder cannot be made, or its file system has no locks.
        """
        with _disk_errors(self.building / _LOCK):
            lock = self._take_lock()
        try:
            yield
        finally:
            if not self.in_progress:  # the lock is the last file in it
                (self.building / _LOCK).unlink(missing_ok=True)
                for folder in (self.building, self.out):
                    with suppress(OSError):  # it has other files
                        folder.rmdir()
            # A forked process may have the descriptor too, so closing it is not enough
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _take_lock(self) -> int:
        path = self.building / _LOCK
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the previous holder has just removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except FileNotFoundError:  # it has just removed the file, so this lock has no effect
                pass
            except OSError:
                os.close(lock)
                raise
            os.close(lock)

    @property
    def in_progress(self) -> bool:
        """Whether there are files that are not moved into place yet."""
        return (self.building / _MARK).exists()

    def discard(self) -> None:
        """Remove the files that are not moved into place yet."""
        for path in self.building.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()

    def files(self, table: str, name: str) -> tuple[Path, Path]:
        """Return the paths of the new and of the earlier file of a part."""
        within = Path(table) / f"{name}.parquet"
        return self.building / within, self.out / within

    def complete(self, table: str) -> Iterator[Path]:
        """Yield the part files of a table: those of an interrupted run, then the earlier ones."""
        for folder in (self.building / table, self.out / table):
            yield from sorted(folder.glob("*.parquet"))

    def publish(self, table: str, names: Iterable[str]) -> bool:
        """Move new part files of a table to ``out``, and remove those that are not in ``names``.

        Returns:
            Whether the table has changed.

        Raises:
            StorageError: The files cannot be moved or removed.
        """
        folder, kept = self.out / table, {f"{name}.parquet" for name in names}
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            old = [path for path in folder.glob("*.parquet") if path.name not in kept]
            new = [path for path in (self.building / table).glob("*.parquet") if path.name in kept]
            if old or new:  # the mark and the index are out of date until all files are moved
                for stale in (_MARK, f"{table}.faiss", f"{table}.ids.parquet"):
                    (self.out / stale).unlink(missing_ok=True)
            for path in old:
                path.unlink()
            for path in sorted(new):
                os.replace(path, folder / path.name)
        return bool(old or new)

    def finish(
        self, made_with: Mapping[str, Any], skipped: Iterable[Mapping[str, str]], card: str
    ) -> None:
        """Write the files that describe the tables. The mark is last.

        Raises:
            StorageError: The disk is full, or refuses to write.
        """
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
        if lines:
            write_text(self.out / "skipped.jsonl", "".join(lines))
        else:
            (self.out / "skipped.jsonl").unlink(missing_ok=True)
        write_text(self.out / "README.md", card)
        write_json(self.out / _MARK, dict(made_with), indent=2)
        self.discard()


def _difference(
    differing: Collection[str], there: Mapping[str, Any], now: Mapping[str, Any]
) -> str:
    """Describe the first difference. A change of the model comes before one of an option."""
    if _MODEL & set(differing):
        return f"another model, or of another state of it: {there['scenario']} of {there['model']}"
    name = next(name for name in there if name in differing)
    return f"{there['model']} with {name} {there[name]}, and not {now.get(name)}"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(folder, error) from error
