"""Checkpoints in a bucket: fetched before a run, uploaded in the background during it."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from clipft.cli.console import Output
from clipft.config.settings import Settings
from clipft.config.sources import S3Url, cached_bucket, parse_s3_url
from clipft.core.cache import mark_used
from clipft.core.errors import ClipftError, ModelError, UsageError, sentences
from clipft.core.files import read_json, write_json

if TYPE_CHECKING:
    from clipft.storage.s3.checkpoints import CheckpointStore, Manifest, Run
    from clipft.storage.s3.uploader import Uploader
    from clipft.training.signals import StopRequest

_IDENTITY = "s3-run.json"
"""File in the run folder by which a resumed run is known to the bucket as the same run."""

RUN_FILES = ("best.pt", "metrics.jsonl", "skipped.jsonl")
"""Files uploaded with each checkpoint, so that a run whose machine was lost ends with the same
files as one that was never interrupted."""


class Uploads:
    """Uploads one run's checkpoints to the bucket.

    Without ``enable_s3_checkpoints``, and in all processes but the first, its methods do
    nothing.
    """

    def __init__(self, settings: Settings, out: Output) -> None:
        self._settings, self._out = settings, out
        self._uploader: Uploader | None = None

    def begin(self) -> None:
        """Fetch the checkpoint that the run may resume from, and start the uploader.

        Raises:
            UsageError: no bucket is set.
            StorageError: the bucket cannot be read, or holds no undamaged checkpoint.
        """
        settings, out = self._settings, self._out
        if not settings.enable_s3_checkpoints:
            return
        from clipft.storage.s3.checkpoints import CheckpointStore, Run
        from clipft.storage.s3.client import open_bucket
        from clipft.storage.s3.uploader import Uploader

        check_bucket_named(settings)
        store = CheckpointStore(
            open_bucket(settings, out.note),
            settings.s3_checkpoint_prefix.strip("/"),
            settings.checkpoint_path.stem,
        )
        run = None
        if settings.resume_from_checkpoint:
            _fetch_if_newer(store, settings, out)
            if settings.checkpoint_path.exists():
                run = _read_run(settings.run_dir)
        run = run or Run(secrets.token_hex(8), time.time())
        _write_run(settings.run_dir, run)
        self._uploader = Uploader(store, run, settings.keep_s3_checkpoints, out.note)

    def saved(self, path: Path, step: int) -> None:
        """Queue a checkpoint for upload and return at once."""
        if self._uploader:
            folder = self._settings.run_dir
            files = {path.name: path, **{name: folder / name for name in RUN_FILES}}
            self._uploader.saved(step, files)

    def finished(self, path: Path, step: int) -> None:
        """Queue the last checkpoint of a run that had already ended and so saved nothing now."""
        if self._uploader and not self._uploader.saves:
            self.saved(path, step)

    @contextmanager
    def awaited(self, stop: "StopRequest") -> Iterator[None]:
        """Wait at the end of the block for the last upload; a signal in ``stop`` ends the wait.

        An upload that fails is only warned of when the block itself raised an error, which
        matters more. Otherwise ``check`` raises it.
        """
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
        """Raise what went wrong with the last upload.

        Raises:
            Interrupted: a signal ended the wait for it.
            StorageError: it did not reach the bucket.
        """
        if not self._uploader:
            return
        if self._uploader.given_up:
            stop.check("while its checkpoint was uploaded", self._settings.checkpoint_path)
        if self._uploader.error:
            raise self._uploader.error


def check_bucket_named(settings: Settings) -> None:
    """Check that there is a bucket to upload checkpoints to, if they are to be uploaded.

    Raises:
        UsageError: no bucket is set.
    """
    if settings.enable_s3_checkpoints and not settings.s3_bucket:
        raise UsageError(
            "--enable-s3-checkpoints needs a bucket",
            "name one with --s3-bucket, or drop --enable-s3-checkpoints",
        )


def _fetch_if_newer(store: "CheckpointStore", settings: Settings, out: Output) -> None:
    """Fetch the bucket's newest checkpoint, unless the local one is as new or of another run.

    Raises:
        StorageError: the bucket cannot be read, so nobody knows whether there is a checkpoint
            (starting from scratch could overwrite it), or no checkpoint in it is undamaged.
    """
    from clipft.runs.checkpoint import load_checkpoint

    manifest, path = store.manifest(), settings.checkpoint_path
    if manifest is None:
        if not path.exists():
            out.note("warning: no checkpoint found in S3.")
        return
    if path.exists():
        own = _read_run(settings.run_dir)
        if own is None or own.id != manifest.run.id:
            out.note(
                f"note: {path} belongs to another run than the checkpoint in S3; the local one "
                "is used."
            )
            return
        try:
            step = load_checkpoint(path)["step"]
            if not manifest.saves or step >= manifest.saves[0].step:
                return
        except ModelError as error:
            out.note(f"warning: {error.message}; using the one in S3.")
    step = _fetch(store, manifest, path, settings.run_dir, out)
    out.note(f"Fetched the checkpoint of step {step} from {store.url}.")


def fetch_place(url: S3Url, settings: Settings, output_dir: Path, out: Output) -> Path:
    """Fetch the newest undamaged checkpoint at an ``s3://`` location; return its local path.

    The location is a manifest (``.../dual_lora_checkpoint.json``, with or without the ending)
    or a prefix, under which the manifest written last is chosen.

    Raises:
        ModelError: there is no checkpoint.
        StorageError: the bucket cannot be read, or no checkpoint is undamaged.
    """
    from clipft.storage.s3.checkpoints import CheckpointStore
    from clipft.storage.s3.client import open_bucket

    bucket = open_bucket(settings.model_copy(update={"s3_bucket": url.bucket}), out.note)
    folder, _, name = url.prefix.rpartition("/")
    name = name.removesuffix(".json").removesuffix(".pt")
    if not name.endswith("_checkpoint"):  # a prefix: take the newest manifest directly under it
        prefix = f"{url.prefix}/".lstrip("/")
        found = [
            entry
            for entry in bucket.entries(prefix)
            if entry.key.endswith("_checkpoint.json") and "/" not in entry.key[len(prefix) :]
        ]
        newest = max(found, key=lambda e: datetime.fromisoformat(e.modified), default=None)
        folder, _, name = newest.key.rpartition("/") if newest else ("", "", "")
    store = CheckpointStore(bucket, folder, name.removesuffix(".json"))
    manifest = store.manifest() if name else None
    if manifest is None:
        raise ModelError(
            f"no checkpoint at {url}",
            sentences(
                bucket.names_near(url.prefix),
                "name the prefix of --s3-checkpoint-prefix, such as s3://bucket/checkpoints",
            ),
        )
    path = output_dir / f"{store.name}.pt"
    run_dir = output_dir / store.name.removesuffix("_checkpoint")
    step = _fetch(store, manifest, path, run_dir, out)
    out.note(f"Fetched the checkpoint of step {step} from {store.url} to {output_dir}.")
    return path


def _fetch(
    store: "CheckpointStore", manifest: "Manifest", path: Path, run_dir: Path, out: Output
) -> int:
    """Fetch the newest undamaged save to ``path`` and ``run_dir``; return its step."""
    from clipft.runs.checkpoint import previous_of

    save = store.fetch(
        manifest, lambda name: path if name == path.name else run_dir / name, out.note
    )
    # What the save lacks must not stay from whatever was there before
    for name in set(RUN_FILES) - save.files.keys():
        (run_dir / name).unlink(missing_ok=True)
    previous_of(path).unlink(missing_ok=True)
    _write_run(run_dir, manifest.run)
    return save.step


def fetched_checkpoint(place: Path | None, settings: Settings, out: Output) -> Path | None:
    """Return ``place``, or for an ``s3://`` location the run folder it was fetched to."""
    url = parse_s3_url(place) if place else None
    if url is None:
        return place
    folder = cached_bucket(url.bucket) / (url.prefix or "checkpoints")
    path = fetch_place(url, settings, folder, out)
    mark_used(cached_bucket(url.bucket))
    return path.with_name(path.stem.removesuffix("_checkpoint"))


def local_model(place: str, settings: Settings, out: Output) -> str:
    """Return a model's name or path, or for an ``s3://`` location where it was fetched to."""
    if parse_s3_url(place) is None:
        return place
    return str(fetched_checkpoint(Path(place), settings, out))


def _read_run(folder: Path) -> "Run | None":
    """The run that the folder belongs to in the bucket; None if that is not known."""
    from clipft.storage.s3.checkpoints import Run

    try:
        content = read_json(folder / _IDENTITY) or {}
        return Run(str(content["id"]), float(content["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _write_run(folder: Path, run: "Run") -> None:
    write_json(folder / _IDENTITY, {"id": run.id, "started": run.started})
