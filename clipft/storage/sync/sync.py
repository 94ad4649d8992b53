"""``sync``: the bucket's pairs as local files, each whole or not there at all; or the way up.

An object arrives under a temporary name, is checked and only then renamed. What is there
already is known by a journal in each folder (size, ETag, time of change) or, without it, by
its md5. Nothing is deleted but on demand.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipft.config.settings import StorageSettings
from clipft.core.common import counted
from clipft.core.errors import StorageError
from clipft.storage.s3.bucket import Bucket, bucket_url, quiet
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.errors import check_space
from clipft.storage.s3.keys import Filter, Refused, RemoteObject, folder_prefixes
from clipft.storage.sync.download import Fetch, SyncProgress, part_name
from clipft.storage.sync.folder import Folder, local_files, remove_files

SIDES = ("train", "val")


@dataclass(frozen=True)
class SyncOptions:
    """``delete``: what the source lacks goes, inside the two folders or prefixes alone;
    ``dry_run``: nothing is changed."""

    filter: Filter = field(default_factory=Filter)
    delete: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class SyncResult:
    """``transferred`` objects of ``bytes`` came, or went up; ``notes`` are sentences that
    deserve a reader; ``planned`` names what a dry run would have transferred or deleted."""

    objects: int
    transferred: int
    skipped: int
    deleted: int
    bytes: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    seconds: float
    planned: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What the bucket holds for each side, as far as the filter takes it."""

    bucket: Bucket
    prefixes: dict[str, str]
    objects: dict[str, list[RemoteObject]]
    refused: dict[str, list[Refused]]

    def names(self, side: str) -> list[str]:
        """Paths below the folder of ``side``."""
        return [wanted.path for wanted in self.objects[side]]


def look(
    settings: StorageSettings,
    chosen: Filter = Filter(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = quiet,
) -> Found:
    """List both prefixes. ``say`` is told when failures last.

    Raises:
        UsageError: no bucket is set, or one prefix lies within the other.
        StorageError: the bucket cannot be read.
    """
    bucket = open_bucket(settings, say)
    prefixes = dict(zip(SIDES, folder_prefixes(settings), strict=True))
    objects, refused = {}, {}
    for side, prefix in prefixes.items():
        listed, refused[side] = bucket.list(prefix)
        objects[side] = [o for o in listed if chosen.takes(o.path)]
    return Found(bucket, prefixes, objects, refused)


def sync(
    settings: StorageSettings,
    report: Callable[[SyncProgress], None],
    options: SyncOptions = SyncOptions(),
) -> SyncResult:
    """``look`` and ``bring``, to ``data_dir``."""
    return bring(look(settings, options.filter), settings.data_dir, report, options)


def bring(
    found: Found,
    target: Path,
    report: Callable[[SyncProgress], None],
    options: SyncOptions = SyncOptions(),
) -> SyncResult:
    """Bring what was found to ``target``/train and ``target``/val.

    ``report`` is called on the caller's thread, several times a second.

    Raises:
        StorageError: there is nothing to train on, an object does not arrive whole, or the
            disk does not take it.
    """
    return _bring(found, SIDES, target, report, options, _check_found(found))


def bring_side(
    found: Found, side: str, target: Path, report: Callable[[SyncProgress], None]
) -> SyncResult:
    """The same for one of the two."""
    return _bring(found, (side,), target, report, SyncOptions(), [])


def _bring(
    found: Found,
    sides: tuple[str, ...],
    target: Path,
    report: Callable[[SyncProgress], None],
    options: SyncOptions,
    notes: list[str],
) -> SyncResult:
    start = time.monotonic()
    folders = [Folder(target / s, found.objects[s], list(found.refused[s])) for s in sides]
    listed = sum(len(folder.objects) + len(folder.refused) for folder in folders)
    if options.dry_run:
        return _planned(folders, listed, options, time.monotonic() - start)
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(folder.opened())
        work = [(f, o) for f in folders for o in f.objects if not f.has(o)]
        kept = {part_name(wanted) for _, wanted in work}
        for folder in folders:
            folder.remove_stale_parts(kept)
        check_space(target, sum(folder.bytes_short(wanted) for folder, wanted in work))
        fetch = Fetch(found.bucket, work)
        if work:
            fetch.run(report)
        deleted = _delete(folders, options) if options.delete else 0
        notes += [] if options.delete else [n for f in folders for n in _left_over(f, options)]
    refused = tuple(refusal for folder in folders for refusal in folder.refused)
    return SyncResult(
        objects=listed,
        transferred=fetch.downloaded,
        skipped=listed - fetch.downloaded - len(refused),
        deleted=deleted,
        bytes=fetch.bytes,
        refused=refused,
        notes=tuple(notes),
        seconds=time.monotonic() - start,
    )


def _check_found(found: Found) -> list[str]:
    settings = found.bucket.settings
    if not found.objects["train"] and not found.refused["train"]:
        raise StorageError(
            f"bucket {settings.s3_bucket} has nothing under prefix {settings.s3_prefix!r}",
            "check --s3-prefix; its objects become the files of the train folder",
        )
    if not found.objects["val"] and not found.refused["val"]:
        return [f"nothing to validate on under {bucket_url(settings, settings.s3_val_prefix)}"]
    return []


def _planned(
    folders: list[Folder], listed: int, options: SyncOptions, seconds: float
) -> SyncResult:
    """What ``bring`` would do; nothing is locked or made."""
    work, gone = [], list[str]()
    for folder in folders:
        folder.load()
        work += [(folder, o) for o in folder.objects if not folder.has(o)]
        if options.delete:
            gone += [str(folder.path / name) for name in _surplus(folder, options)]
    refused = tuple(refusal for folder in folders for refusal in folder.refused)
    return SyncResult(
        objects=listed,
        transferred=len(work),
        skipped=listed - len(work) - len(refused),
        deleted=len(gone),
        bytes=sum(wanted.size for _, wanted in work),
        refused=refused,
        notes=("dry run: nothing was changed",),
        seconds=seconds,
        planned=(
            *(f"get {folder.path / wanted.path}" for folder, wanted in work),
            *(f"delete {name}" for name in gone),
        ),
    )


def _surplus(folder: Folder, options: SyncOptions) -> list[str]:
    """Files of the folder that the bucket does not have, as far as the filter takes them."""
    present = {wanted.path for wanted in folder.objects}
    return [
        name
        for name in local_files(folder.path)
        if name not in present and options.filter.takes(name)
    ]


def _delete(folders: list[Folder], options: SyncOptions) -> int:
    deleted = 0
    for folder in folders:
        names = _surplus(folder, options)
        remove_files(folder.path, names)
        folder.forget(names)
        deleted += len(names)
    return deleted


def _left_over(folder: Folder, options: SyncOptions) -> Iterator[str]:
    """What an earlier sync brought and the bucket has no longer: training would read it."""
    gone = [name for name in _surplus(folder, options) if name in folder.records]
    if gone:
        yield (
            f"no longer in the bucket: {counted(len(gone), 'file')} of {folder.path}, "
            f"first {gone[0]} (--delete removes them)"
        )


__all__ = ["Filter", "Found", "SyncOptions", "SyncProgress", "SyncResult", "bring", "look", "sync"]
