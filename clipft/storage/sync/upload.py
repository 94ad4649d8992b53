"""``clipft sync --up``: upload local pairs to a bucket, except for those that are already there."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from clipft.storage.sync.folder import local_files
from clipft.storage.sync.sync import SIDES, BucketListing, SyncOptions, SyncResult, list_bucket

_DELETED_AT_ONCE = 1000
"""S3 deletes this many objects in one request."""


class _Upload(NamedTuple):
    path: Path
    key: str
    size: int


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
    todo = _missing_or_different(listing, settings.data_dir, names)
    surplus = list[str]()
    if options.delete:
        for side in SIDES:
            # An empty local folder does not mean that the bucket should be emptied too
            if kept := set(names[side]):
                surplus += [o.key for o in listing.objects[side] if o.path not in kept]
    planned: tuple[str, ...] = ()
    if options.dry_run:
        url = listing.bucket.url
        puts = [f"put {url(file.key)}" for file in todo]
        planned = (*puts, *(f"delete {url(key)}" for key in surplus))
    else:
        _send(listing.bucket, todo, settings.s3_requests, report)
        _delete(listing.bucket, surplus)
    total = sum(len(side) for side in names.values())
    return SyncResult(
        objects=total,
        transferred=len(todo),
        skipped=total - len(todo),
        deleted=len(surplus),
        bytes=sum(file.size for file in todo),
        refused=(),
        notes=("dry run: nothing was changed",) if options.dry_run else (),
        seconds=time.monotonic() - start,
        planned=planned,
    )


def _missing_or_different(
    listing: BucketListing, data_dir: Path, names: dict[str, list[str]]
) -> list[_Upload]:
    """Return the local files that are not in the bucket, or differ according to the ETag."""

    def differs(there: RemoteObject | None, upload: _Upload) -> bool:
        if there is None or there.size != upload.size:
            return True
        with open(upload.path, "rb") as file:
            return not matches(file, upload.size, there.etag)

    found, uploads = list[RemoteObject | None](), list[_Upload]()
    for side, prefix in listing.prefixes.items():
        there = {wanted.path: wanted for wanted in listing.objects[side]}
        for name in names[side]:
            path = data_dir / side / name
            found.append(there.get(name))
            uploads.append(_Upload(path, prefix + name, path.stat().st_size))
    with ThreadPoolExecutor(processors()) as pool:
        different = pool.map(differs, found, uploads)
        return [upload for upload, changed in zip(uploads, different, strict=True) if changed]


def _send(
    bucket: Bucket,
    todo: list[_Upload],
    requests: int,
    report: Callable[[TransferProgress], None],
) -> None:
    """Upload files, ``requests`` at a time, counting the parts of large ones."""
    files_at_once = max(1, min(requests, len(todo)))
    parts = max(1, requests // files_at_once)

    def send(upload: _Upload) -> _Upload:
        path, size = upload.path, upload.size
        try:
            with open(path, "rb") as file:
                bucket.put(upload.key, file, size, lambda: path.stat().st_size == size, parts)
        except OSError as error:
            raise disk_error(path, error) from error
        return upload

    files_done = bytes_done = 0
    total = sum(upload.size for upload in todo)
    with ThreadPoolExecutor(files_at_once) as pool:
        try:
            for done in pool.map(send, todo):
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
