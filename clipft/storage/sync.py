"""``sync``: the bucket's pairs as local files, each whole or not there at all.

An object arrives under a temporary name, is checked and only then renamed. What is there
already is known by a small manifest in each target folder (size, ETag, time of change), or,
without it, by its md5. Nothing is deleted.
"""

import hashlib
import json
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from clipft.errors import StorageError
from clipft.settings import StorageSettings
from clipft.storage.checkpoints import download
from clipft.storage.locations import (
    OWN_PREFIX,
    PLAIN_MD5,
    THREADS,
    Refused,
    RefusedKey,
    RemoteObject,
    bucket_url,
    check_space,
    disk_error,
    folder_prefixes,
    list_objects,
    open_client,
    storage_errors,
)

MANIFEST = f"{OWN_PREFIX}sync.json"
LOCK = f"{OWN_PREFIX}sync.lock"
PART = f"{OWN_PREFIX}part-"

_SAVE_EVERY = 2.0
_REPORT_EVERY = 0.2


@dataclass(frozen=True)
class SyncProgress:
    """How far a sync is with what was not there yet."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int


@dataclass(frozen=True)
class SyncResult:
    """``bytes`` are those downloaded; ``notes`` are sentences that deserve a reader."""

    objects: int
    downloaded: int
    skipped: int
    bytes: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Target:
    """A local folder, what belongs there, and what the manifest says of it."""

    folder: Path
    objects: list[RemoteObject]
    refused: list[Refused]
    records: dict[str, Any] = field(default_factory=dict)
    saved: float = 0.0

    def load(self) -> None:
        """Read the manifest; a broken one counts as none."""
        with suppress(OSError, ValueError):
            content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("objects"), dict):
                self.records = content["objects"]

    def save(self) -> None:
        text = json.dumps({"version": 1, "objects": self.records}, ensure_ascii=False)
        part = _part(self.folder)
        try:
            with open(part, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.folder / MANIFEST)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise disk_error(error, self.folder / MANIFEST, len(text)) from error
        self.saved = time.monotonic()

    def status(self, wanted: RemoteObject) -> os.stat_result | None:
        """Of a regular file that is reached without any link inside the folder."""
        if any((self.folder / parent).is_symlink() for parent in wanted.folders):
            return None
        with suppress(OSError):
            status = (self.folder / wanted.path).lstat()
            return status if stat.S_ISREG(status.st_mode) else None
        return None

    def record(self, wanted: RemoteObject) -> None:
        status = (self.folder / wanted.path).lstat()
        self.records[wanted.path.as_posix()] = _record(wanted, status)

    def has(self, wanted: RemoteObject) -> bool:
        """Whether the file is as a sync left it, and the object as it was then."""
        status = self.status(wanted)
        if status is None or status.st_size != wanted.size:
            return False
        return bool(self.records.get(wanted.path.as_posix()) == _record(wanted, status))

    def has_same_bytes(self, wanted: RemoteObject) -> bool:
        """Whether the file is the object by its md5, where the ETag is one."""
        status = self.status(wanted)
        if status is None or status.st_size != wanted.size:
            return False
        if not PLAIN_MD5.fullmatch(wanted.etag.strip('"')):
            return False
        with open(self.folder / wanted.path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() == wanted.etag.strip('"')

    def bytes_short(self, wanted: RemoteObject) -> int:
        status = self.status(wanted)
        return wanted.size - (status.st_size if status else 0)


def _record(wanted: RemoteObject, status: os.stat_result) -> dict[str, Any]:
    return {"etag": wanted.etag, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _part(folder: Path) -> Path:
    return folder / f"{PART}{uuid.uuid4().hex}"


class _Stopped(Exception):
    """Another object failed, or the user stopped the sync."""


class _Sync:
    """One run: a few threads that fetch, the caller's thread that books and reports."""

    def __init__(self, client: Any, settings: StorageSettings, targets: list[_Target]) -> None:
        self._client, self._settings = client, settings
        self.todo = [(t, o) for t in targets for o in t.objects if not t.has(o)]
        self.bytes_wanted = sum(o.size for _, o in self.todo)
        self.files_done = self.bytes_done = self.downloaded = self.bytes = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(self, report: Callable[[SyncProgress], None]) -> None:
        work = iter(self.todo)
        with ThreadPoolExecutor(THREADS) as pool:
            running: dict[Future[bool], tuple[_Target, RemoteObject]] = {}
            try:
                while running or self.files_done < len(self.todo):
                    for target, wanted in islice(work, 2 * THREADS - len(running)):
                        running[pool.submit(self._bring, target, wanted)] = (target, wanted)
                    finished, _ = wait(running, _REPORT_EVERY, FIRST_COMPLETED)
                    for future in finished:
                        self._book(future, *running.pop(future))
                    report(self._progress())
            except BaseException:
                self._stopping.set()
                pool.shutdown(cancel_futures=True)
                for future, place in running.items():
                    with suppress(Exception, CancelledError):
                        self._book(future, *place)
                raise

    def _progress(self) -> SyncProgress:
        return SyncProgress(self.files_done, len(self.todo), self.bytes_done, self.bytes_wanted)

    def _book(self, future: Future[bool], target: _Target, wanted: RemoteObject) -> None:
        try:
            fetched = future.result()
        except RefusedKey as refusal:
            target.refused.append(Refused(wanted.key, str(refusal)))
        else:
            target.record(wanted)
            self.downloaded += fetched
            self.bytes += wanted.size if fetched else 0
        self.files_done += 1
        if time.monotonic() - target.saved > _SAVE_EVERY:
            target.save()

    def _count(self, count: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        with self._lock:
            self.bytes_done += count

    def _bring(self, target: _Target, wanted: RemoteObject) -> bool:
        """Whether the object had to be downloaded."""
        if target.has_same_bytes(wanted):
            self._count(wanted.size)
            return False
        place, part = target.folder / wanted.path, _part(target.folder)
        try:
            _make_way(target.folder, wanted)
            self._download(wanted, part)
            os.replace(part, place)
        except OSError as error:
            raise disk_error(error, place, wanted.size) from error
        finally:
            part.unlink(missing_ok=True)
        return True

    def _download(self, wanted: RemoteObject, part: Path) -> None:
        """Exactly the version that was listed."""
        bucket, url = str(self._settings.s3_bucket), bucket_url(self._settings, wanted.key)
        request = {"Bucket": bucket, "Key": wanted.key, "IfMatch": wanted.etag}
        with storage_errors(self._settings, url):
            answer = download(self._client, request, part, self._count)
        if answer["ETag"] != wanted.etag or answer["ContentLength"] != wanted.size:
            raise StorageError(f"{url} was changed while it was read", "repeat the command")


def sync(settings: StorageSettings, report: Callable[[SyncProgress], None]) -> SyncResult:
    """Bring the bucket's training and validation pairs to ``data_dir``.

    ``report`` is called on the caller's thread, several times a second.

    Raises:
        UsageError: no bucket is set, or one prefix lies within the other.
        StorageError: the bucket cannot be read, its training prefix is empty, an object does
            not arrive whole, or the disk does not take it.
    """
    start = time.monotonic()
    client = open_client(settings)
    prefixes = dict(zip(("train", "val"), folder_prefixes(settings), strict=True))
    targets = [
        _Target(settings.data_dir / name, *list_objects(client, settings, prefix))
        for name, prefix in prefixes.items()
    ]
    notes = _check_found(targets, settings)
    listed = sum(len(target.objects) + len(target.refused) for target in targets)
    with ExitStack() as held:
        for target in targets:
            held.enter_context(_opened(target))
        notes += [note for target in targets for note in _left_over(target)]
        work = _Sync(client, settings, targets)
        check_space(settings.data_dir, sum(t.bytes_short(o) for t, o in work.todo))
        work.run(report)
    refused = tuple(refusal for target in targets for refusal in target.refused)
    return SyncResult(
        objects=listed,
        downloaded=work.downloaded,
        skipped=listed - work.downloaded - len(refused),
        bytes=work.bytes,
        refused=refused,
        notes=tuple(notes),
        seconds=time.monotonic() - start,
    )


def _check_found(targets: list[_Target], settings: StorageSettings) -> list[str]:
    train, val = targets
    if not train.objects and not train.refused:
        raise StorageError(
            f"bucket {settings.s3_bucket} has nothing under prefix {settings.s3_prefix!r}",
            "check --s3-prefix; its objects become the files of the train folder",
        )
    if not val.objects and not val.refused:
        return [f"nothing to validate on under {bucket_url(settings, settings.s3_val_prefix)}"]
    return []


def _left_over(target: _Target) -> Iterator[str]:
    """What an earlier sync brought and the bucket has no longer: training would read it."""
    present = {wanted.path.as_posix() for wanted in target.objects}
    gone = [name for name in target.records if name not in present]
    gone = [name for name in gone if (target.folder / name).exists()]
    if gone:
        yield f"{len(gone)} files of {target.folder} are no longer in the bucket: {gone[0]} ..."


@contextmanager
def _opened(target: _Target) -> Iterator[None]:
    """The folder made, locked and rid of stale parts; its manifest read, and at last saved."""
    import fcntl

    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        lock = _lock_file(target.folder)
    except OSError as error:
        raise disk_error(error, target.folder, 0) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"another sync is writing to {target.folder}", "wait until it has ended"
            ) from error
        for part in target.folder.glob(f"{PART}*"):
            part.unlink(missing_ok=True)
        target.load()
        try:
            yield
        finally:
            target.save()


def _lock_file(folder: Path) -> IO[str]:
    return open(folder / LOCK, "a")


def _make_way(folder: Path, wanted: RemoteObject) -> None:
    """Make the folders of an object, following no link and taking nobody's place."""
    for parent in reversed(wanted.folders):
        if (folder / parent).is_symlink():
            raise RefusedKey(f"{parent} in the target is a link")
        try:
            (folder / parent).mkdir(exist_ok=True)
        except FileExistsError:
            raise RefusedKey(f"{parent} in the target is a file") from None
    if (folder / wanted.path).is_dir() and not (folder / wanted.path).is_symlink():
        raise RefusedKey(f"{wanted.path} in the target is a folder")
