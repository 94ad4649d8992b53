"""``clipft sync --up``: upload local pairs to a bucket, except for those that are already there.

The journal of a folder says which files have not changed since the last sync. All others are
compared by their md5.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note, processors
from clipft.core.errors import StorageError
from clipft.core.files import disk_error
from clipft.storage.s3.bucket import Bucket
from clipft.storage.s3.checksums import matches
from clipft.storage.s3.keys import RemoteObject
from clipft.storage.sync.download import TransferProgress
from clipft.storage.sync.folder import Folder, local_files
from clipft.storage.sync.sync import SIDES, BucketListing, SyncOptions, SyncResult, list_bucket

_DELETED_AT_ONCE = 1000
"""S3 deletes this many objects in one request."""


class _Upload(NamedTuple):
    """A local file, and what it will be in the bucket.

    ``status`` is the file's status from before it is read. If the file changes later, the journal
    has the old size or time, and the next sync compares it again.
    """

    folder: Folder
    wanted: RemoteObject
    status: os.stat_result


def upload(
    settings: StorageSettings,
    report: Callable[[TransferProgress], None],
    options: SyncOptions,
    note: Note = lambda message: None,
) -> SyncResult:
    """Upload the folders train, val and test of ``data_dir`` to their prefixes.

    ``report`` is called after each file, ``note`` when requests keep failing.

    Raises:
        UsageError: no bucket is set.
        StorageError: there is nothing to upload, or a file did not arrive intact.
    """
    start = time.monotonic()
    listing = list_bucket(settings, options.filter, note)
    names = {
        side: [n for n in local_files(settings.data_dir / side) if options.filter.matches(n)]
        for side in SIDES
    }
    if not any(names.values()):
        raise StorageError(
            f"there is nothing to send in {settings.data_dir}/train and {settings.data_dir}/val",
            "name the folder that contains them with --data-dir",
        )
    folders = {side: Folder(settings.data_dir / side, listing.objects[side], []) for side in SIDES}
    todo = _missing_or_different(listing, folders, names)
    surplus = list[str]()
    if options.delete:
        for side in SIDES:
            # An empty local folder does not mean that the bucket should be emptied too
            if kept := set(names[side]):
                surplus += [o.key for o in listing.objects[side] if o.path not in kept]
    planned: tuple[str, ...] = ()
    if options.dry_run:
        url = listing.bucket.url
        puts = [f"put {url(file.wanted.key)}" for file in todo]
        planned = (*puts, *(f"delete {url(key)}" for key in surplus))
    else:
        try:
            _send(listing.bucket, todo, settings.s3_requests, report)
        finally:
            for folder in folders.values():
                folder.remember()
        _delete(listing.bucket, surplus)
    total = sum(len(side) for side in names.values())
    return SyncResult(
        objects=total,
        transferred=len(todo),
        skipped=total - len(todo),
        deleted=len(surplus),
        bytes=sum(file.wanted.size for file in todo),
        refused=(),
        notes=("dry run: nothing was changed",) if options.dry_run else (),
        seconds=time.monotonic() - start,
        planned=planned,
    )


def _missing_or_different(
    listing: BucketListing, folders: dict[str, Folder], names: dict[str, list[str]]
) -> list[_Upload]:
    """Return the local files that are not in the bucket, or differ according to the ETag.

    Files that had to be read, and are the same, are recorded in ``folders``.
    """
    uploads, unknown = list[_Upload](), list[tuple[_Upload, RemoteObject]]()
    for side, prefix in listing.prefixes.items():
        folder = folders[side]
        folder.load()
        in_bucket = {there.path: there for there in listing.objects[side]}
        for name in names[side]:
            status, there = os.stat(folder.path / name), in_bucket.get(name)
            upload = _Upload(folder, RemoteObject(prefix + name, name, status.st_size, ""), status)
            if there is None or there.size != status.st_size:
                uploads.append(upload)
            elif not folder.has(there):
                unknown.append((upload, there))

    def is_same(one: tuple[_Upload, RemoteObject]) -> bool:
        upload, there = one
        with open(upload.folder.local(there), "rb") as file:
            return bool(matches(file, there.size, there.etag))

    with ThreadPoolExecutor(processors()) as pool:
        for (upload, there), same in zip(unknown, pool.map(is_same, unknown), strict=True):
            if same:
                upload.folder.record(there, upload.status)
            else:
                uploads.append(upload)
    return uploads


def _send(
    bucket: Bucket,
    todo: list[_Upload],
    requests: int,
    report: Callable[[TransferProgress], None],
) -> None:
    """Upload files, ``requests`` at a time, counting the parts of large ones."""
    files_at_once = max(1, min(requests, len(todo)))
    parts = max(1, requests // files_at_once)

    def send(upload: _Upload) -> RemoteObject:
        wanted, path = upload.wanted, upload.folder.local(upload.wanted)

        def unchanged() -> bool:
            return os.stat(path).st_size == wanted.size

        try:
            with open(path, "rb") as file:
                etag = bucket.put(wanted.key, file, wanted.size, unchanged, parts)
        except OSError as error:
            raise disk_error(Path(path), error) from error
        return replace(wanted, etag=etag)

    files_done = bytes_done = 0
    total = sum(upload.wanted.size for upload in todo)
    with ThreadPoolExecutor(files_at_once) as pool:
        try:
            for upload, done in zip(todo, pool.map(send, todo), strict=True):
                upload.folder.record(done, upload.status)
                files_done, bytes_done = files_done + 1, bytes_done + done.size
                report(TransferProgress(files_done, len(todo), bytes_done, total))
        except BaseException:
            bucket.retry.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _delete(bucket: Bucket, keys: list[str]) -> None:
    for start in range(0, len(keys), _DELETED_AT_ONCE):
        objects = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
        answer = bucket.call("delete_objects", "", Delete={"Objects": objects, "Quiet": True})
        for failure in answer.get("Errors", ()):
            raise StorageError(
                f"could not delete {bucket.url(failure['Key'])}: {failure.get('Code')}",
                "the credentials need s3:DeleteObject for --delete",
            )
