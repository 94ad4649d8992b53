"""``sync --up``: local pairs to the bucket. What is there already, by size and ETag, stays."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clipft.config.settings import StorageSettings
from clipft.core.errors import StorageError
from clipft.core.files import disk_error
from clipft.storage.s3.bucket import Bucket, put_checked, quiet
from clipft.storage.s3.checksums import PART_BYTES, etag_of
from clipft.storage.s3.errors import Changed
from clipft.storage.s3.keys import RemoteObject
from clipft.storage.sync.download import SyncProgress
from clipft.storage.sync.folder import local_files
from clipft.storage.sync.sync import SIDES, Found, SyncOptions, SyncResult, look

_DELETED_AT_ONCE = 1000


@dataclass(frozen=True)
class _Upload:
    path: Path
    key: str
    size: int


def send(
    settings: StorageSettings,
    report: Callable[[SyncProgress], None],
    options: SyncOptions,
    say: Callable[[str], None] = quiet,
) -> SyncResult:
    """Bring ``data_dir``/train and /val to their prefixes.

    Raises:
        UsageError: no bucket is set.
        StorageError: there is nothing to send, or a file does not arrive as it is.
    """
    start = time.monotonic()
    found = look(settings, options.filter, say)
    names = {
        side: [n for n in local_files(settings.data_dir / side) if options.filter.takes(n)]
        for side in SIDES
    }
    if not any(names.values()):
        raise StorageError(
            f"nothing to send in {settings.data_dir}/train and {settings.data_dir}/val",
            "name the folder that holds them with --data-dir",
        )
    todo = _todo(found, settings.data_dir, names)
    surplus = _surplus(found, names) if options.delete else []
    if not options.dry_run:
        _send_all(found.bucket, todo, settings.s3_requests, report)
        _delete(found.bucket, surplus)
    total = sum(len(side) for side in names.values())
    return SyncResult(
        objects=total,
        transferred=len(todo),
        skipped=total - len(todo),
        deleted=len(surplus),
        bytes=sum(upload.size for upload in todo),
        refused=(),
        notes=("dry run: nothing was changed",) if options.dry_run else (),
        seconds=time.monotonic() - start,
        planned=_plan(found.bucket, todo, surplus) if options.dry_run else (),
    )


def _plan(bucket: Bucket, todo: list[_Upload], surplus: list[str]) -> tuple[str, ...]:
    puts = [f"put {bucket.url(upload.key)}" for upload in todo]
    return (*puts, *(f"delete {bucket.url(key)}" for key in surplus))


def _todo(found: Found, data_dir: Path, names: dict[str, list[str]]) -> list[_Upload]:
    todo = []
    for side, prefix in found.prefixes.items():
        there = {wanted.path: wanted for wanted in found.objects[side]}
        for name in names[side]:
            path = data_dir / side / name
            size = path.stat().st_size
            if not _is_same(path, size, there.get(name)):
                todo.append(_Upload(path, prefix + name, size))
    return todo


def _is_same(path: Path, size: int, there: RemoteObject | None) -> bool:
    if there is None or there.size != size:
        return False
    with open(path, "rb") as file:
        return there.etag in {etag_of(file, size, part) for part in {size, PART_BYTES}}


def _surplus(found: Found, names: dict[str, list[str]]) -> list[str]:
    """Keys without a file; none of a side that is empty here: that is no wish to empty it."""
    keys = []
    for side in SIDES:
        kept = set(names[side])
        if kept:
            keys += [o.key for o in found.objects[side] if o.path not in kept]
    return keys


def _delete(bucket: Bucket, keys: list[str]) -> None:
    for start in range(0, len(keys), _DELETED_AT_ONCE):
        objects = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
        answer = bucket.call("delete_objects", "", Delete={"Objects": objects, "Quiet": True})
        for failure in answer.get("Errors", ()):
            raise StorageError(
                f"{bucket.url(failure['Key'])} was not deleted: {failure.get('Code')}",
                "the credentials need s3:DeleteObject for --delete",
            )


def _send_all(
    bucket: Bucket,
    todo: list[_Upload],
    requests: int,
    report: Callable[[SyncProgress], None],
) -> None:
    files_done = bytes_done = 0
    total = sum(upload.size for upload in todo)
    with ThreadPoolExecutor(requests) as pool:
        try:
            for upload in pool.map(lambda u: _send(bucket, u), todo):
                files_done, bytes_done = files_done + 1, bytes_done + upload.size
                report(SyncProgress(files_done, len(todo), bytes_done, total))
        except BaseException:
            bucket.patience.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _send(bucket: Bucket, upload: _Upload) -> _Upload:
    """One file, compared with what the server says it got."""

    def unchanged() -> None:
        if upload.path.stat().st_size != upload.size:
            raise Changed

    try:
        with open(upload.path, "rb") as file:
            put_checked(bucket, upload.key, file, upload.size, unchanged)
    except OSError as error:
        raise disk_error(upload.path, error) from error
    return upload
