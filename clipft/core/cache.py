"""Finds, lists and cleans the cache folder.

All entries can be made again, so removing them only costs time. An entry is a file or folder that a
command has made, such as the features of one data set from one tower.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from clipft.core.common import expand_home
from clipft.core.errors import StorageError

CACHES = {
    "features": ("*", "outputs of frozen encoders, for training"),
    "pictures": ("*", "embeddings of images, for search and browse"),
    "captions": ("*", "tokens of captions"),
    "indexes": ("*", "indexes of shards in read-only folders"),
    "open_clip": ("*", "models converted from open_clip"),
    "s3": ("*", "pairs downloaded from a bucket"),
    "batch sizes": ("batch_sizes.json", "results of find-batch-size"),
}
"""Each kind of entry with the pattern of its names and a description of its content."""

_COMPUTED = ("features", "pictures", "captions", "open_clip")
"""Kinds of entries that are removed to keep a limit. They were computed on this machine; downloads
and checkpoints are kept."""

_IN_USE = 3600
"""An entry counts as in use for this many seconds after its last use, and is then not removed to
keep a limit."""


@dataclass(frozen=True)
class CacheEntry:
    """One file or folder of the cache."""

    kind: str
    path: Path
    bytes: int
    last_used: float
    """Seconds since 1970."""
    unfinished: bool = False
    """True if the entry is still being written, or if the process that wrote it was killed."""

    def to_dict(self) -> dict[str, object]:
        return {**self.__dict__, "path": str(self.path)}


def cache_folder() -> Path:
    """Return ``CLIPFT_CACHE``, or ``clipft`` in the user's cache folder. It may not exist yet."""
    if given := os.environ.get("CLIPFT_CACHE", "").strip():
        return expand_home(given)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "clipft"


def mark_used(path: Path) -> None:
    """Record that an entry is used now. File systems do not reliably record the time of reading."""
    with suppress(OSError):  # a read-only cache can still be used
        os.utime(path)


def cache_entries() -> list[CacheEntry]:
    """List the entries of the cache, the least recently used first."""
    return sorted(_entries(), key=lambda entry: entry.last_used)


def to_prune(
    entries: Collection[CacheEntry],
    kinds: Collection[str] = (),
    unused_days: float = 0,
    keep_bytes: int | None = None,
    now: float | None = None,
) -> list[CacheEntry]:
    """Choose the entries to remove.

    Args:
        entries: the entries that ``cache_entries`` returned.
        kinds: only choose these kinds; all if empty.
        unused_days: only choose entries that were not used for this many days.
        keep_bytes: choose only as many entries as needed to reduce the cache to this size.
        now: the time, in seconds since 1970.
    """
    before = (time.time() if now is None else now) - unused_days * 86400
    excess = None if keep_bytes is None else sum(e.bytes for e in entries) - keep_bytes
    chosen = []
    for entry in entries:
        if (kinds and entry.kind not in kinds) or entry.last_used > before:
            continue
        if excess is not None:
            if excess <= 0:
                break
            excess -= entry.bytes
        chosen.append(entry)
    return chosen


def remove(entry: CacheEntry) -> None:
    """Remove an entry. A process that has it open can still read it.

    Raises:
        StorageError: The folder of the cache cannot be written to.
    """
    # Renamed first, so that no reader finds a partly removed folder
    doomed = entry.path.with_name(f".{entry.path.name.lstrip('.')}.{os.getpid()}")
    try:
        os.replace(entry.path, doomed)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
    except FileNotFoundError:  # another process has removed it
        return
    except OSError as error:
        raise StorageError(
            f"cannot remove {entry.path}: {error.strerror}", "check who owns the folder"
        ) from error


def keep_within(limit: int) -> list[CacheEntry]:
    """Remove the least recently used computed entries until all have at most ``limit`` bytes.

    Downloads are not counted. Entries that were used within the last hour are kept, because a
    process may still use them.

    Raises:
        StorageError: The folder of the cache cannot be written to.
    """
    entries = [entry for entry in cache_entries() if entry.kind in _COMPUTED]
    removed = to_prune(entries, unused_days=_IN_USE / 86400, keep_bytes=limit)
    for entry in removed:
        remove(entry)
    return removed


def _entries() -> Iterator[CacheEntry]:
    for kind, (pattern, _) in CACHES.items():
        folder = cache_folder() if pattern != "*" else cache_folder() / kind
        for path in folder.glob(pattern):
            process = path.suffix.removeprefix(".")
            unfinished = path.name.startswith(".")
            if unfinished and process.isdecimal() and _is_alive(int(process)):
                continue
            with suppress(OSError):  # removed in the meantime
                found = [file.lstat() for file in (path, *path.rglob("*"))]
                size = sum(stat.st_size for stat in found if S_ISREG(stat.st_mode))
                last_used = max(stat.st_mtime for stat in found)
                yield CacheEntry(kind, path, size, last_used, unfinished)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
