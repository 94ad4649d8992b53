"""Checkpoints in a bucket. A reader finds only complete saves, and no save replaces a newer one.

{prefix}/{name}.json                       the manifest: a list of the saves, newest first
{prefix}/{name}/{run}/{sha256}-{file}      their files: the checkpoint, best.pt, the metrics

Files are uploaded under unique names and verified. The manifest is written last, and only if it has
not changed since it was read (If-Match, If-None-Match). If two processes write at the same time,
one is refused and reads the manifest again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipft.core.common import Note
from clipft.core.errors import StorageError
from clipft.core.files import disk_error, replacing
from clipft.storage.s3.bucket import RANGE, Bucket
from clipft.storage.s3.checksums import BinaryFile
from clipft.storage.s3.errors import Changed, code_and_status
from clipft.storage.s3.keys import OWN_PREFIX, RefusedKey, RemoteObject, local_path

VERSION = 1
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict"}
_CONFLICT_ATTEMPTS = 8


@dataclass(frozen=True)
class Run:
    """The run that saves. A resumed run keeps its ``id``. ``started`` is in Unix seconds."""

    id: str
    started: float


@dataclass(frozen=True)
class StoredFile:
    """One file of a save, as an object of the bucket. ``size`` is in bytes."""

    key: str
    size: int
    sha256: str
    etag: str


@dataclass(frozen=True)
class Save:
    """The files of a run after ``step``, by their names in the run's folder."""

    step: int
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class Manifest:
    """The saves of a run, newest first, and in ``earlier`` the last save of the run before it."""

    run: Run
    saves: tuple[Save, ...]
    earlier: Save | None = None

    def to_json(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def from_json(text: bytes) -> "Manifest":
        """
        Raises:
            ValueError, KeyError, TypeError, RefusedKey: it is not a manifest, or it names a
                file outside the run's folder.
        """
        content = json.loads(text)
        if content["version"] > VERSION:
            raise ValueError("it was written by a newer clipft")

        def save(entry: Any) -> Save:
            files = {local_path(name): StoredFile(**f) for name, f in entry["files"].items()}
            return Save(int(entry["step"]), files)

        saves = tuple(save(entry) for entry in content["saves"])
        earlier = save(content["earlier"]) if content["earlier"] else None
        return Manifest(Run(**content["run"]), saves, earlier)

    def with_save(self, save: Save, run: Run, keep: int) -> "Manifest":
        """Return the manifest with ``save`` first and at most ``keep`` saves. A new run replaces
        the saves of the run before it, except for the last."""
        if self.run.id != run.id:
            return Manifest(run, (save,), self.saves[0] if self.saves else None)
        older = [other for other in self.saves if other.step < save.step]
        return Manifest(self.run, (save, *older[: keep - 1]), self.earlier)

    def keys(self) -> set[str]:
        """The keys of all files that the manifest names."""
        saves = [*self.saves, *([self.earlier] if self.earlier else [])]
        return {stored.key for save in saves for stored in save.files.values()}


class _Damaged(Exception):
    """A save cannot be fetched completely; the text is the reason."""


@dataclass(frozen=True)
class CheckpointStore:
    """The saves with one name, such as ``dual_lora_checkpoint``, under a prefix of a bucket."""

    bucket: Bucket
    prefix: str
    name: str

    @property
    def manifest_key(self) -> str:
        return f"{self.prefix}/{self.name}.json".lstrip("/")

    @property
    def url(self) -> str:
        return self.bucket.url(self.manifest_key)

    def manifest(self) -> Manifest | None:
        """Fetch the manifest; None if S3 says that it does not exist.

        Raises:
            StorageError: it cannot be read for any other reason.
        """
        return self._read()[0]

    def _read(self) -> tuple[Manifest | None, str]:
        """The manifest and its ETag; (None, "") if there is none."""
        found = self.bucket.read(self.manifest_key)
        if found is None:
            return None, ""
        try:
            return Manifest.from_json(found[0]), found[1]
        except (ValueError, KeyError, TypeError, AttributeError, RefusedKey) as error:
            raise StorageError(
                f"{self.url} is not a list of checkpoints: {error}",
                "delete it to start over, or use another --s3-checkpoint-prefix",
            ) from error

    def upload(self, step: int, files: Mapping[str, BinaryFile], run: Run, keep: int) -> bool:
        """Add a save and delete all but the newest ``keep`` of the run. If the run already has a
        newer save, change nothing and return False.

        Raises:
            StorageError: a file did not arrive intact, or a run that started later saves to the
                same place.
            Stopped: the bucket's ``retry`` was told to stop.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        former, etag = self._read()
        if not self._may_follow(former, step, run):
            return False
        known = {f.key: f for save in (former.saves if former else ()) for f in save.files.values()}
        stored = {}
        for name, file in files.items():
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            key = f"{self.prefix}/{self.name}/{run.id}/{digest[:32]}-{name}".lstrip("/")
            if key not in known:  # otherwise an earlier save has the same bytes
                size = file.seek(0, os.SEEK_END)
                known[key] = StoredFile(key, size, digest, self.bucket.put(key, file, size))
            stored[name] = known[key]
        save = Save(step, stored)
        for _ in range(_CONFLICT_ATTEMPTS):
            manifest = former.with_save(save, run, keep) if former else Manifest(run, (save,))
            if self._write(manifest, etag):
                break
            # Another writer was faster
            former, etag = self._read()
            if not self._may_follow(former, step, run):
                return False
        else:
            raise StorageError(
                f"{self.url} is constantly being changed by other writers",
                "give each run its own --s3-checkpoint-prefix",
            )
        for key in former.keys() - manifest.keys() if former else ():
            # Without permission to delete, files that are no longer in the manifest stay; a
            # lifecycle rule of the bucket may remove them
            with suppress(BotoCoreError, ClientError):
                self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)
        return True

    def _may_follow(self, former: Manifest | None, step: int, run: Run) -> bool:
        """Return whether a save of ``run`` at ``step`` would be the newest.

        Raises:
            StorageError: the manifest belongs to a run that started later.
        """
        if not former or not former.saves:
            return True
        if former.run.id == run.id:
            return step >= former.saves[0].step
        if former.run.started < run.started:
            return True
        raise StorageError(
            f"{self.url}: a run that started later keeps its checkpoints there",
            "give each run its own --s3-checkpoint-prefix",
        )

    def _write(self, manifest: Manifest, etag: str) -> bool:
        """Write the manifest if the one in the bucket still has this ETag ("": if there is still
        none). Return False if it has changed."""
        # Some servers expect the ETag with quotes, others without
        matching = [{"IfMatch": etag.strip('"')}, {"IfMatch": etag}]
        key, body = self.manifest_key, manifest.to_json()
        for condition in matching if etag else [{"IfNoneMatch": "*"}]:
            try:
                self.bucket.call("put_object", key, Key=key, Body=body, **condition)
                return True
            except StorageError as error:
                if code_and_status(error.__cause__)[0] not in _CONFLICTS:
                    raise
        return False

    def fetch(self, manifest: Manifest, local: Callable[[str], Path], note: Note) -> Save:
        """Download the newest complete save; ``local`` returns the path for each file name.

        Local files are replaced only when all files of the save have arrived.

        Raises:
            StorageError: no save is complete, or the server or the disk fails.
        """
        for save in manifest.saves:
            try:
                self._fetch(save, local)
                return save
            except _Damaged as damage:
                note(
                    f"warning: the checkpoint of step {save.step} in {self.url} is damaged "
                    f"({damage}). Trying the one before it."
                )
        raise StorageError(
            f"{self.url} lists no intact checkpoint",
            "use another checkpoint, or start without --resume-from-checkpoint",
        )

    def _fetch(self, save: Save, local: Callable[[str], Path]) -> None:
        wanted = {name: f for name, f in save.files.items() if not _is_there(local(name), f)}
        if not wanted:
            return
        folder = local(next(iter(save.files))).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{OWN_PREFIX}fetch-", dir=folder))
            try:
                for name, stored in wanted.items():
                    self._download(stored, temporary / name)
                # The checkpoint last: once it is in place, the save counts as complete
                for name in sorted(wanted, key=lambda name: name == f"{self.name}.pt"):
                    with replacing(local(name)) as part:
                        os.replace(temporary / name, part)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            size = sum(stored.size for stored in wanted.values())
            raise disk_error(folder, error, size) from error

    def _download(self, stored: StoredFile, path: Path) -> None:
        """
        Raises:
            _Damaged: the object is gone, was replaced, or has other bytes.
        """
        wanted = RemoteObject(stored.key, path.name, stored.size, stored.etag)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with ThreadPoolExecutor(4) as pool:
                starts = range(0, stored.size, RANGE)
                ends = [min(start + RANGE, stored.size) for start in starts]
                fetch = partial(self.bucket.get_into, wanted, descriptor=descriptor)
                list(pool.map(fetch, starts, ends))
        except StorageError as error:
            cause = error.__cause__
            replaced = type(cause).__name__ == "PreconditionError"  # obstore's name for 412
            if replaced or isinstance(cause, (Changed, FileNotFoundError)):
                raise _Damaged(error.message) from error
            raise
        finally:
            os.close(descriptor)
        if not _is_there(path, stored):
            raise _Damaged("its SHA-256 is not the one it was uploaded with")


def _is_there(path: Path, stored: StoredFile) -> bool:
    """Return whether a local file has the bytes of a stored one."""
    with suppress(OSError):
        if path.stat().st_size == stored.size:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
    return False
