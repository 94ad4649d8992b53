"""Checkpoints that lie in a bucket: fetched before a run, uploaded behind its back."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipft.cli.console import Output
from clipft.config.settings import Settings
from clipft.config.sources import S3Url, cached_bucket, parse_s3_url
from clipft.core.errors import ClipftError, ModelError, UsageError
from clipft.core.files import read_json, write_json

if TYPE_CHECKING:
    from clipft.storage.s3.bucket import Bucket
    from clipft.storage.s3.checkpoints import CheckpointStore, Manifest, Run
    from clipft.storage.s3.uploader import Uploader
    from clipft.training.signals import StopRequest

_IDENTITY = "s3-run.json"
"""In the run's folder: who it is to the bucket, so that a resumed run is the same one."""

_MANIFEST = "_checkpoint.json"

RUN_FILES = ("best.pt", "metrics.jsonl", "skipped.jsonl")
"""What goes along with a checkpoint, so that a run that lost its machine ends with the same
files as one that did not."""


def checkpoint_store(settings: Settings, out: Output) -> "CheckpointStore":
    """Where the run of these settings keeps its checkpoints.

    Raises:
        UsageError: no bucket is set.
    """
    from clipft.storage.s3.checkpoints import CheckpointStore
    from clipft.storage.s3.client import open_bucket

    if not settings.s3_bucket:
        raise UsageError(
            "--enable-s3-checkpoints needs a bucket",
            "name one with --s3-bucket, or leave --enable-s3-checkpoints out",
        )
    bucket = open_bucket(settings, out.note)
    prefix = settings.s3_checkpoint_prefix.strip("/")
    return CheckpointStore(bucket, prefix, settings.checkpoint_path.stem)


def fetch_newest(store: "CheckpointStore", settings: Settings, out: Output) -> None:
    """Bring the newest whole save, where the machine has none or an older one of that run.

    Only a proven absence lets a run start at epoch 0.

    Raises:
        StorageError: it cannot be seen, or none is whole.
    """
    manifest = store.manifest()
    if manifest is None:
        if not settings.checkpoint_path.exists():
            out.note("warning: no checkpoint found in S3.")
        return
    if not _is_newer(manifest, settings, out):
        return
    step = _fetch(store, manifest, settings.checkpoint_path, settings.run_dir, out)
    _write_run(settings.run_dir, manifest.run)
    out.note(f"Fetched the checkpoint of step {step} from {store.url}.")


def fetch_place(url: S3Url, settings: Settings, output_dir: Path, out: Output) -> Path:
    """Bring the newest whole save that an ``s3://`` location names; the checkpoint's path.

    The location is a manifest (``.../dual_lora_checkpoint.json``, the ending may be left out)
    or the prefix that holds some, of which the one written last is taken.

    Raises:
        ModelError: there is none.
        StorageError: it cannot be seen, or none is whole.
    """
    from clipft.storage.s3.client import open_bucket

    bucket = open_bucket(settings.model_copy(update={"s3_bucket": url.bucket}), out.note)
    store = _named(bucket, url) or _newest(bucket, url)
    manifest = store.manifest() if store else None
    if store is None or manifest is None:
        raise ModelError(
            f"no checkpoint at {url}",
            "name the prefix of --s3-checkpoint-prefix, such as s3://bucket/checkpoints",
        )
    path = output_dir / f"{store.name}.pt"
    step = _fetch(store, manifest, path, output_dir / store.name.removesuffix("_checkpoint"), out)
    _write_run(output_dir / store.name.removesuffix("_checkpoint"), manifest.run)
    out.note(f"Fetched the checkpoint of step {step} from {store.url} to {output_dir}.")
    return path


def fetched_checkpoint(place: Path | None, settings: Settings, out: Output) -> Path | None:
    """A local path as it is; an ``s3://`` location brought to the cache folder: the run's
    folder there."""
    url = parse_s3_url(place) if place else None
    if url is None:
        return place
    folder = cached_bucket(url.bucket) / (url.prefix or "checkpoints")
    path = fetch_place(url, settings, folder, out)
    return path.with_name(path.stem.removesuffix("_checkpoint"))


def local_model(place: str, settings: Settings, out: Output) -> str:
    """A model's name or path as it is; an ``s3://`` location brought to the cache folder."""
    if parse_s3_url(place) is None:
        return place
    return str(fetched_checkpoint(Path(place), settings, out))


class Uploads:
    """The checkpoints of one run on their way to the bucket; without
    ``enable_s3_checkpoints`` nothing of it does anything."""

    def __init__(self, settings: Settings, out: Output) -> None:
        self._settings, self._out = settings, out
        self._uploader: Uploader | None = None

    def begin(self) -> None:
        """Before the run: fetch what it may go on from, and start to upload.

        Raises:
            UsageError: no bucket is set.
            StorageError: as ``fetch_newest``.
        """
        settings, out = self._settings, self._out
        if not settings.enable_s3_checkpoints:
            return
        from clipft.storage.s3.uploader import Uploader

        store = checkpoint_store(settings, out)
        if settings.resume_from_checkpoint:
            fetch_newest(store, settings, out)
        resumes = settings.resume_from_checkpoint and settings.checkpoint_path.exists()
        run = (_read_run(settings.run_dir) if resumes else None) or _new_run()
        _write_run(settings.run_dir, run)
        self._uploader = Uploader(store, run, settings.keep_s3_checkpoints, out.note)

    def saved(self, path: Path, step: int) -> None:
        """Of a saved checkpoint: returns at once."""
        if self._uploader:
            folder = self._settings.run_dir
            files = {path.name: path, **{name: folder / name for name in RUN_FILES}}
            self._uploader.saved(step, files)

    def finished(self, path: Path, step: int) -> None:
        """Of a run that ended: one that had ended before saved nothing now."""
        if self._uploader and not self._uploader.saves:
            self.saved(path, step)

    @contextmanager
    def awaited(self, stop: "StopRequest") -> Iterator[None]:
        """When the block has ended, however that was, the last save is in the bucket or given
        up; after an error of the run's own, which counts for more, that is only said. ``stop``
        gives it up."""
        try:
            yield
        except KeyboardInterrupt:
            if self._uploader:
                self._uploader.abandon()
            raise
        except ClipftError:
            if self._uploader and (error := self._uploader.close(lambda: bool(stop.name))):
                self._out.note(f"warning: {error.message}.")
            raise
        if self._uploader:
            self._uploader.close(lambda: bool(stop.name))

    def check(self, stop: "StopRequest") -> None:
        """
        Raises:
            Interrupted: ``stop`` gave up the last save.
            StorageError: it is not in the bucket.
        """
        if not self._uploader:
            return
        if self._uploader.given_up:
            stop.check("while its upload was awaited", self._settings.checkpoint_path)
        self._uploader.check()


def _is_newer(manifest: "Manifest", settings: Settings, out: Output) -> bool:
    from clipft.runs.checkpoint import load_checkpoint

    path = settings.checkpoint_path
    if not path.exists():
        return True
    own = _read_run(settings.run_dir)
    if own is None or own.id != manifest.run.id:
        out.note(f"note: {path} is of another run than the checkpoint in S3; it is kept.")
        return False
    try:
        return bool(manifest.saves and load_checkpoint(path)["step"] < manifest.saves[0].step)
    except ModelError as error:
        out.note(f"warning: {error.message}; taking the one in S3.")
        return True


def _fetch(
    store: "CheckpointStore", manifest: "Manifest", path: Path, folder: Path, out: Output
) -> int:
    from clipft.runs.checkpoint import previous_of

    def place(name: str) -> Path:
        return path if name == path.name else folder / name

    save = store.fetch(manifest, place, out.note)
    for name in set(RUN_FILES) - save.files.keys():  # of whatever lay there before
        (folder / name).unlink(missing_ok=True)
    previous_of(path).unlink(missing_ok=True)
    return save.step


def _named(bucket: "Bucket", url: S3Url) -> "CheckpointStore | None":
    from clipft.storage.s3.checkpoints import CheckpointStore

    prefix, _, name = url.prefix.rpartition("/")
    name = name.removesuffix(".json").removesuffix(".pt")
    if not name.endswith("_checkpoint"):
        return None
    return CheckpointStore(bucket, prefix, name)


def _newest(bucket: "Bucket", url: S3Url) -> "CheckpointStore | None":
    """The manifest under a prefix that was written last."""
    from clipft.storage.s3.checkpoints import CheckpointStore

    prefix = f"{url.prefix}/".lstrip("/")
    found = bucket.times(prefix, _MANIFEST)
    if not found:
        return None
    folder, _, name = max(found, key=lambda key: found[key]).rpartition("/")
    return CheckpointStore(bucket, folder, name.removesuffix(".json"))


def _new_run() -> "Run":
    from clipft.storage.s3.checkpoints import Run

    return Run(secrets.token_hex(8), time.time())


def _read_run(folder: Path) -> "Run | None":
    from clipft.storage.s3.checkpoints import Run

    try:
        content = read_json(folder / _IDENTITY) or {}
        return Run(str(content["id"]), float(content["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _write_run(folder: Path, run: "Run") -> None:
    write_json(folder / _IDENTITY, {"id": run.id, "started": run.started})
