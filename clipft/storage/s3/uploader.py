"""Upload saved checkpoints in the background while training continues.

Training hands over open files, so a newer save that is renamed over them changes nothing. One
upload runs at a time and one waits. A newer save replaces the one that waits, and one that keeps
failing. A failure is reported once; the last save is tried again at the end.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path

from clipft.core.common import Note
from clipft.core.errors import StorageError
from clipft.storage.s3.checkpoints import CheckpointStore, Run
from clipft.storage.s3.checksums import BinaryFile
from clipft.storage.s3.errors import Stopped


class _Snapshot:
    """The files of a save as they were when it was made; those that do not exist are skipped."""

    def __init__(self, step: int, paths: Mapping[str, Path]) -> None:
        self.step = step
        self.files: dict[str, BinaryFile] = {}
        self._open = ExitStack()
        self.close = self._open.close
        for name, path in paths.items():
            with suppress(FileNotFoundError):
                # A checkpoint is only ever replaced by a rename, which leaves an open file as it
                # is. Other files, such as the metrics, grow in place.
                grows = path.suffix != ".pt"
                file: BinaryFile = BytesIO(path.read_bytes()) if grows else open(path, "rb")  # noqa: SIM115
                self._open.callback(file.close)
                self.files[name] = file


class Uploader:
    """Uploads saves in a thread: ``saved`` returns at once, ``close`` waits for the last one."""

    def __init__(self, store: CheckpointStore, run: Run, keep: int, note: Note) -> None:
        self._store, self._run, self._keep, self._note = store, run, keep, note
        self._retry = store.bucket.retry
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._failed: _Snapshot | None = None
        self._busy = self._closing = self._warned = False
        self._error: StorageError | None = None
        self._thread = threading.Thread(target=self._serve, name="checkpoints", daemon=True)
        self._thread.start()
        self.saves = 0
        self.given_up = False
        """Whether ``close`` stopped waiting before the last save was uploaded."""

    def saved(self, step: int, paths: Mapping[str, Path]) -> None:
        """Take over the files of a save, by their names; files that do not exist are skipped."""
        with self._changed:
            if self._waiting:
                self._waiting.close()
            self._waiting = _Snapshot(step, paths)
            self._retry.stop_if_failing()
            self.saves += 1
            self._changed.notify()

    def close(self, give_up: Callable[[], bool] = lambda: False) -> StorageError | None:
        """Wait until the last save is in the bucket, trying it once more if it failed before.
        ``give_up`` is asked several times a second whether to stop waiting.

        Returns:
            The reason why the last save is not in the bucket, or None if it is.
        """
        with self._changed:
            self._closing = True
            if self._waiting or self._failed or self._busy:
                self._note(f"Waiting for the last checkpoint to arrive at {self._store.url} ...")
            self._changed.notify()
        while self._thread.is_alive():
            if give_up():
                self.given_up = True
                self.abandon()
                return StorageError(
                    "stopped waiting for the upload of the last checkpoint", "upload it again"
                )
            self._thread.join(0.2)
        return self._error

    def check(self) -> None:
        """
        Raises:
            StorageError: the last save is not in the bucket.
        """
        if self._error:
            raise self._error

    def abandon(self) -> None:
        """Give up the running upload, because the user wants to leave at once."""
        self._retry.stopping.set()

    def _serve(self) -> None:
        """The thread: upload what waits until ``close`` is called, then what failed last."""
        while (snapshot := self._next()) is not None:
            final = self._closing
            try:
                self._store.upload(snapshot.step, snapshot.files, self._run, self._keep)
                self._error = None
            except Stopped:  # a newer save waits
                pass
            except StorageError as error:
                self._report(error)
                if not final:
                    self._failed = snapshot
                    continue
            except Exception as error:
                self._report(
                    StorageError(f"{self._store.url}: {error}", "this is a bug: please report it")
                )
            snapshot.close()

    def _next(self) -> _Snapshot | None:
        """Wait for the next save to upload; None when there is nothing left and ``close`` was
        called."""
        with self._changed:
            self._busy = False
            while not self._waiting and not self._closing:
                self._changed.wait()
            snapshot = self._waiting or self._failed
            if self._failed and self._failed is not snapshot:
                self._failed.close()
            self._waiting = self._failed = None
            self._busy = snapshot is not None
            self._retry.stopping.clear()
            return snapshot

    def _report(self, error: StorageError) -> None:
        self._error = StorageError(
            f"the last checkpoint is not in the bucket: {error.message}",
            f"the local file is whole and `clipft resume` uploads it again; {error.hint}",
        )
        if not self._warned:
            self._warned = True
            self._note(
                f"warning: a checkpoint was not uploaded: {error.message}. Training continues."
            )
