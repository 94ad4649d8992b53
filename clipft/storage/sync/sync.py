"""``clipft sync``: download the pairs in a bucket to a local folder.

An object is written under a temporary name, checked and only then renamed. Existing files are
recognized by the journal of their folder or, without an entry, by their md5. Nothing is deleted
unless the user asks for it.
"""

import shutil
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note, counted
from clipft.core.errors import StorageError
from clipft.storage.s3.bucket import Bucket
from clipft.storage.s3.client import open_bucket
from clipft.storage.s3.keys import Filter, Refused, RemoteObject, folder_prefixes
from clipft.storage.sync.download import Download, TransferProgress
from clipft.storage.sync.folder import PART, Folder, local_files
from clipft.storage.sync.incoming import part_name

SIDES = ("train", "val", "test")
WHOLE = "."
"""The side of a listing with only one prefix, whose folder is the target itself."""


@dataclass(frozen=True)
class SyncOptions:
    """``delete`` removes files that the source does not have, only inside the folders or prefixes;
    ``dry_run`` changes nothing."""

    filter: Filter = field(default_factory=Filter)
    delete: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class SyncResult:
    """The result of a sync: it moved ``transferred`` objects with ``bytes`` bytes. ``notes`` are
    sentences for the user; ``planned`` lists what a dry run would have transferred or deleted."""

    objects: int
    transferred: int
    skipped: int
    deleted: int
    bytes: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    seconds: float
    planned: tuple[str, ...] = ()


@dataclass(frozen=True)
class BucketListing:
    """The objects of each side ("train", "val", "test") that match the filter, and the refused
    keys.

    ``left_out`` counts the objects that do not match the filter.
    """

    bucket: Bucket
    prefixes: dict[str, str]
    objects: dict[str, list[RemoteObject]]
    refused: dict[str, list[Refused]]
    left_out: int = 0


def list_bucket(
    settings: StorageSettings,
    chosen: Filter = Filter(),  # noqa: B008 (frozen)
    note: Note = lambda message: None,
) -> BucketListing:
    """List the prefixes of all sides. ``note`` is called when requests keep failing.

    Raises:
        UsageError: no bucket is set, or one prefix contains the other.
        StorageError: the bucket cannot be listed.
    """
    bucket = open_bucket(settings, note)
    prefixes = dict(zip(SIDES, folder_prefixes(settings), strict=True))
    objects, refused, left_out = {}, {}, 0
    for side, prefix in prefixes.items():
        listed, refused[side] = bucket.list(prefix)
        objects[side] = [o for o in listed if chosen.matches(o.path)]
        left_out += len(listed) - len(objects[side])
    return BucketListing(bucket, prefixes, objects, refused, left_out)


def list_prefix(
    settings: StorageSettings, prefix: str, note: Note = lambda message: None
) -> BucketListing:
    """List everything under ``prefix`` as one side, which is downloaded to the target folder
    itself. ``note`` is called when requests keep failing.

    Raises:
        UsageError: no bucket is set.
        StorageError: the bucket cannot be listed.
    """
    bucket = open_bucket(settings, note)
    inside = f"{prefix.strip('/')}/".lstrip("/")
    objects, refused = bucket.list(inside)
    return BucketListing(bucket, {WHOLE: inside}, {WHOLE: objects}, {WHOLE: refused})


def download(
    listing: BucketListing,
    target: Path,
    report: Callable[[TransferProgress], None],
    options: SyncOptions = SyncOptions(),
    sides: Sequence[str] = SIDES,
) -> SyncResult:
    """Download the listed objects to folders in ``target`` that are named after their sides.

    A test folder is not created if it would be empty. ``report`` is called in the caller's thread,
    several times a second.

    Raises:
        StorageError: there are no training pairs, an object does not arrive intact, or the disk
            is full or fails.
    """
    notes = _check_not_empty(listing) if "train" in sides else []
    start = time.monotonic()
    folders = [
        Folder(target / side, listing.objects[side], list(listing.refused[side]))
        for side in sides
        if side != "test" or listing.objects[side] or (target / side).is_dir()
    ]
    if options.dry_run:
        return _planned(folders, options, start)
    with ExitStack() as opened:
        for folder in folders:
            opened.enter_context(folder.opened())
        work = [(f, o) for f in folders for o in f.objects if not f.has(o)]
        resumable = {part_name(wanted) for _, wanted in work}
        for folder in folders:
            for part in folder.path.glob(f"{PART}*"):
                if part.stem not in resumable:
                    part.unlink(missing_ok=True)
        _check_space(target, work)
        fetch = Download(listing.bucket, work)
        if work:
            fetch.run(report)
        for algorithm, count in fetch.unverified.items():
            notes.append(
                f"{counted(count, 'object')} could be verified only by size and version: computing "
                f"the {algorithm} that the server states needs awscrt (pip install 'clipft[crc]')"
            )
        deleted = 0
        for folder in folders:
            surplus = _surplus(folder, options)
            if options.delete:
                folder.delete(surplus)
                deleted += len(surplus)
            elif gone := [name for name in surplus if name in folder.records]:
                # An earlier sync fetched these files, and training would read them
                notes.append(
                    f"{folder.path} has {counted(len(gone), 'file')} that the bucket no longer "
                    f"has, for example {gone[0]} (--delete removes them)"
                )
    listed = sum(len(folder.objects) + len(folder.refused) for folder in folders)
    refused = tuple(refusal for folder in folders for refusal in folder.refused)
    return SyncResult(
        objects=listed,
        transferred=fetch.fetched,
        skipped=listed - fetch.fetched - len(refused),
        deleted=deleted,
        bytes=fetch.bytes,
        refused=refused,
        notes=tuple(notes),
        seconds=time.monotonic() - start,
    )


def _check_not_empty(listing: BucketListing) -> list[str]:
    """Refuse a bucket without training pairs; return a note if it has no validation pairs."""
    settings = listing.bucket.settings
    if not listing.objects["train"] and not listing.refused["train"]:
        if listing.left_out:
            raise StorageError(
                f"none of the {counted(listing.left_out, 'object')} under "
                f"{listing.bucket.url(settings.s3_prefix)} matches --include and --exclude",
                "patterns match whole paths below the prefix: '*.tar' or 'shoes/*'",
            )
        there = listing.bucket.names_near(settings.s3_prefix)
        raise StorageError(
            f"bucket {settings.s3_bucket} has nothing under the prefix {settings.s3_prefix!r}",
            f"check --s3-prefix: {there}"
            if there
            else "check --s3-prefix; the objects under it become the files of the train folder",
        )
    if not listing.objects["val"] and not listing.refused["val"]:
        place = listing.bucket.url(settings.s3_val_prefix)
        return [f"there are no validation pairs under {place}"]
    return []


def _check_space(target: Path, work: list[tuple[Folder, RemoteObject]]) -> None:
    """Refuse a transfer that cannot fit before its first byte is fetched."""
    wanted = 0
    for folder, remote in work:
        status = folder.status(remote)
        replaced = status.st_size if status and stat.S_ISREG(status.st_mode) else 0
        wanted += remote.size - replaced
    free = shutil.disk_usage(target).free
    if wanted > free:
        raise StorageError(
            f"no space left for {target}: it needs {wanted:,} bytes and has {free:,} free",
            "free some space or choose another --data-dir",
        )


def _planned(folders: list[Folder], options: SyncOptions, start: float) -> SyncResult:
    """Return what ``download`` would do. Nothing is locked or created."""
    work, gone = [], list[str]()
    for folder in folders:
        folder.load()
        work += [(folder, o) for o in folder.objects if not folder.has(o)]
        if options.delete:
            gone += [str(folder.path / name) for name in _surplus(folder, options)]
    listed = sum(len(folder.objects) + len(folder.refused) for folder in folders)
    refused = tuple(refusal for folder in folders for refusal in folder.refused)
    return SyncResult(
        objects=listed,
        transferred=len(work),
        skipped=listed - len(work) - len(refused),
        deleted=len(gone),
        bytes=sum(wanted.size for _, wanted in work),
        refused=refused,
        notes=("dry run: nothing was changed",),
        seconds=time.monotonic() - start,
        planned=(
            *(f"get {folder.path / wanted.path}" for folder, wanted in work),
            *(f"delete {name}" for name in gone),
        ),
    )


def _surplus(folder: Folder, options: SyncOptions) -> list[str]:
    """Return the files of the folder that match the filter and are not in the bucket."""
    present, names = {wanted.path for wanted in folder.objects}, local_files(folder.path)
    return [name for name in names if name not in present and options.filter.matches(name)]
