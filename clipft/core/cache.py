"""The cache folder: where it is, what is in it, and how it is cleaned.

All of it can be made again, so removing it costs time and nothing else. An entry is a file or a
folder that one use of a command has made, such as the features of one data set under one tower.
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
    "features": ("*", "what frozen encoders computed, for training"),
    "pictures": ("*", "embeddings of images, for search and browse"),
    "captions": ("*", "tokens of captions"),
    "indexes": ("*", "places of the pairs in shards that lie in read-only folders"),
    "open_clip": ("*", "models converted from open_clip"),
    "s3": ("*", "pairs downloaded from a bucket"),
    "batch sizes": ("batch_sizes.json", "results of find-batch-size"),
}
"""Each kind of entry with the pattern of its names and with what it holds."""

_COMPUTED = ("features", "pictures", "captions", "open_clip")
"""What a bound removes: what is computed on this machine, and neither downloads nor checkpoints."""

_IN_USE = 3600
"""Seconds after its last use for which an entry is taken to be in use: a bound leaves it alone."""


@dataclass(frozen=True)
class CacheEntry:
    """One file or folder of the cache."""

    kind: str
    path: Path
    bytes: int
    last_used: float
    """Seconds since 1970."""
    unfinished: bool = False
    """True for what a process was writing; it is left behind when the process is killed."""

    def to_dict(self) -> dict[str, object]:
        return {**self.__dict__, "path": str(self.path)}


def cache_folder() -> Path:
    """Return ``CLIPFT_CACHE``, or ``clipft`` in the user's cache folder. It may not exist yet."""
    if given := os.environ.get("CLIPFT_CACHE", "").strip():
        return expand_home(given)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "clipft"


def mark_used(path: Path) -> None:
    """Note that an entry is used now. File systems do not reliably keep the time of reading."""
    with suppress(OSError):  # a cache that cannot be written to is used nevertheless
        os.utime(path)


def cache_entries() -> list[CacheEntry]:
    """List what is in the cache, the entry that was last used longest ago first."""
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
        entries: as ``cache_entries`` lists them.
        kinds: only these kinds; all if empty.
        unused_days: only entries that were not used for so many days.
        keep_bytes: only as many as are needed for the rest of the cache to have at most this size.
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
    """Remove an entry. What has it open can read it to the end.

    Raises:
        StorageError: The folder of the cache cannot be written to.
    """
    # Renamed first, so that no reader finds half of a folder
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
    """Remove what was last used longest ago until what is computed has at most ``limit`` bytes.

    Downloads are not counted. What was used within the last hour stays, because a process may
    still be at work with it.

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
            with suppress(OSError):  # removed meanwhile
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
