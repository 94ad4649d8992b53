"""Checkpoints in the bucket: whole, never overtaken by an older one, absent only when proven so.

{prefix}/{name}.json                       the manifest: which saves there are, newest first
{prefix}/{name}/{run}/{sha256}-{file}      their files: the checkpoint, best.pt, the metrics

Files are put under names of their own and verified; the manifest is written last, on condition
that it is still the one that was read (If-Match, If-None-Match). So whoever reads it finds
whole saves, and of two writers the older one is refused.
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
from pathlib import Path
from typing import Any

from clipft.core.errors import StorageError
from clipft.core.files import disk_error, replacing
from clipft.storage.s3.bucket import PIECE, Bucket, put_checked
from clipft.storage.s3.checksums import BinaryFile
from clipft.storage.s3.errors import Changed, error_code
from clipft.storage.s3.keys import OWN_PREFIX, RefusedKey, RemoteObject, local_path

VERSION = 1
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict"}
_CONFLICT_TRIES = 8
_EARLIER_RUN = "a run that started later keeps its checkpoints there"


@dataclass(frozen=True)
class Run:
    """Who saves: the same for a run and those that resume it. ``started`` in Unix seconds."""

    id: str
    started: float


@dataclass(frozen=True)
class Stored:
    """One file of a save, as an object of the bucket."""

    key: str
    size: int
    sha256: str
    etag: str


@dataclass(frozen=True)
class Save:
    """The files of a run after ``step``, by their names in the run's folder."""

    step: int
    files: dict[str, Stored]


@dataclass(frozen=True)
class Manifest:
    """``saves`` are the newest first; ``earlier`` is the last of the run before."""

    run: Run
    saves: tuple[Save, ...]
    earlier: Save | None = None

    def to_json(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def of_json(text: bytes) -> "Manifest":
        """
        Raises:
            ValueError, KeyError, TypeError: it is not a manifest.
        """
        content = json.loads(text)
        if content["version"] > VERSION:
            raise ValueError("it was written by a newer clipft")
        saves = tuple(_save_of(entry) for entry in content["saves"])
        earlier = _save_of(content["earlier"]) if content["earlier"] else None
        return Manifest(Run(**content["run"]), saves, earlier)

    def keys(self) -> set[str]:
        """Of every file that it names."""
        saves = [*self.saves, *([self.earlier] if self.earlier else [])]
        return {stored.key for save in saves for stored in save.files.values()}


def _save_of(entry: Any) -> Save:
    files = {str(name): Stored(**stored) for name, stored in entry["files"].items()}
    for name in files:
        local_path(name)
    return Save(int(entry["step"]), files)


@dataclass(frozen=True)
class CheckpointStore:
    """The saves of one name, ``dual_lora_checkpoint`` say, under a prefix of a bucket."""

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
        """None: proven not to exist.

        Raises:
            StorageError: whatever else keeps it from being seen.
        """
        found = self._read()
        return found[0] if found else None

    def _read(self) -> tuple[Manifest, str] | None:
        found = self.bucket.read(self.manifest_key)
        if found is None:
            return None
        try:
            return Manifest.of_json(found[0]), found[1]
        except (ValueError, KeyError, TypeError, AttributeError, RefusedKey) as error:
            raise StorageError(
                f"{self.url} is not a list of checkpoints: {error}",
                "remove it to start anew, or use another --s3-checkpoint-prefix",
            ) from error

    def upload(self, step: int, files: Mapping[str, BinaryFile], run: Run, keep: int) -> bool:
        """Add a save and let all but the newest ``keep`` go; False: the run has a newer one.

        Raises:
            StorageError: a file does not arrive as it is, or a later run has taken the place.
            Stopped: the bucket's ``patience`` was told to stop.
        """
        found = self._read()
        if not self._may_follow(found, step, run):
            return False
        known = {
            s.key: s for save in (found[0].saves if found else ()) for s in save.files.values()
        }
        stored = {name: self._put(name, file, run, known) for name, file in files.items()}
        for _ in range(_CONFLICT_TRIES):
            manifest = _followed(found, Save(step, stored), run, keep)
            if self._write(manifest, found):
                self._remove_unnamed(manifest, found)
                return True
            found = self._read()
            if not self._may_follow(found, step, run):
                return False
        raise StorageError(
            f"{self.url} is written by others all the time", "give each run its own prefix"
        )

    def _may_follow(self, found: tuple[Manifest, str] | None, step: int, run: Run) -> bool:
        """
        Raises:
            StorageError: the place is a later run's.
        """
        if not found or not found[0].saves:
            return True
        if found[0].run.id == run.id:
            return step >= found[0].saves[0].step
        if found[0].run.started < run.started:
            return True
        raise StorageError(
            f"{self.url}: {_EARLIER_RUN}", "give each run its own --s3-checkpoint-prefix"
        )

    def _put(self, name: str, file: BinaryFile, run: Run, known: Mapping[str, Stored]) -> Stored:
        """Upload a file and see that it is what lies there; what lies there already is not
        sent again."""
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        key = f"{self.prefix}/{self.name}/{run.id}/{digest[:32]}-{name}".lstrip("/")
        if key in known:
            return known[key]
        size = file.seek(0, os.SEEK_END)
        etag = put_checked(self.bucket, key, file, size, lambda: None)
        return Stored(key, size, digest, etag)

    def _write(self, manifest: Manifest, found: tuple[Manifest, str] | None) -> bool:
        """False: it is no longer what was read."""
        if not found:
            return self._write_if(manifest, {"IfNoneMatch": "*"})
        # Servers differ in whether the quotes belong to an ETag
        spellings = (found[1].strip('"'), found[1])
        return any(self._write_if(manifest, {"IfMatch": etag}) for etag in spellings)

    def _write_if(self, manifest: Manifest, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        request = {"Bucket": self.bucket.name, "Key": self.manifest_key, **condition}

        def put() -> bool:
            try:
                self.bucket.client.put_object(**request, Body=manifest.to_json())
            except ClientError as error:
                if error_code(error) in _CONFLICTS:
                    return False
                raise
            return True

        return self.bucket.patience.ask(put, self.url)

    def _remove_unnamed(self, manifest: Manifest, found: tuple[Manifest, str] | None) -> None:
        """What the former manifest named and this one does not. Without the right to delete
        it stays: a rule of the bucket's may clear it."""
        from botocore.exceptions import BotoCoreError, ClientError

        for key in (found[0].keys() if found else set()) - manifest.keys():
            with suppress(BotoCoreError, ClientError):
                self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)

    def fetch(
        self, manifest: Manifest, place: Callable[[str], Path], say: Callable[[str], None]
    ) -> Save:
        """Bring the newest whole save; ``place`` gives the local path of each of its files.

        What does not arrive whole leaves every local file as it was.

        Raises:
            StorageError: none of them is whole, or the server or the disk refuses.
        """
        for save in manifest.saves:
            try:
                self._fetch(save, place)
                return save
            except _Damaged as damage:
                say(
                    f"warning: the checkpoint of step {save.step} in {self.url} is damaged "
                    f"({damage}): looking for the one before it."
                )
        raise StorageError(
            f"no whole checkpoint is left in {self.url}",
            "use another checkpoint, or start without --resume-from-checkpoint",
        )

    def _fetch(self, save: Save, place: Callable[[str], Path]) -> None:
        wanted = {name: s for name, s in save.files.items() if not _is_there(place(name), s)}
        if not wanted:
            return
        home = place(next(iter(save.files))).parent
        try:
            home.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{OWN_PREFIX}fetch-", dir=home))
            try:
                for name, stored in wanted.items():
                    self._download(stored, temporary / name)
                # The checkpoint last: with it in place the save is taken for whole
                for name in sorted(wanted, key=lambda n: n == self.checkpoint_name):
                    with replacing(place(name)) as part:
                        os.replace(temporary / name, part)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise disk_error(home, error, sum(s.size for s in wanted.values())) from error

    @property
    def checkpoint_name(self) -> str:
        return f"{self.name}.pt"

    def _download(self, stored: Stored, path: Path) -> None:
        """
        Raises:
            _Damaged: it is gone, or another, or has other bytes.
        """
        wanted = RemoteObject(stored.key, path.name, stored.size, stored.etag)

        def bring(start: int) -> None:
            end = min(start + PIECE, stored.size)
            self.bucket.patience.ask(
                lambda: self.bucket.write_once(wanted, start, end, descriptor),
                self.bucket.url(stored.key),
            )

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(bring, range(0, stored.size, PIECE)))
        except StorageError as error:
            if isinstance(error.__cause__, (Changed, FileNotFoundError)) or _is_412(error):
                raise _Damaged(error.message) from error
            raise
        finally:
            os.close(descriptor)
        if not _is_there(path, stored):
            raise _Damaged("it does not have the sha256 it was uploaded with")


class _Damaged(Exception):
    """A save that cannot be had whole; its text is the reason."""


def _followed(found: tuple[Manifest, str] | None, save: Save, run: Run, keep: int) -> Manifest:
    """The manifest with ``save`` before the others of its run."""
    if not found:
        return Manifest(run, (save,))
    former = found[0]
    if former.run.id != run.id:
        return Manifest(run, (save,), former.saves[0] if former.saves else None)
    older = [other for other in former.saves if other.step < save.step]
    return Manifest(former.run, (save, *older[: keep - 1]), former.earlier)


def _is_there(path: Path, stored: Stored) -> bool:
    with suppress(OSError):
        if path.stat().st_size == stored.size:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
    return False


def _is_412(error: StorageError) -> bool:
    return type(error.__cause__).__name__ == "PreconditionError"
