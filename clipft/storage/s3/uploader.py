"""Upload saved checkpoints in the background while training continues.

Training passes open files, which do not change when a newer save is renamed over them. One upload
runs at a time and one waits. A newer save replaces a waiting one and one that keeps failing. A
failure is reported once, and the last save is tried again at the end.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from clipft.core.common import Note
from clipft.core.errors import StorageError
from clipft.storage.s3.checkpoints import CheckpointStore, Run
from clipft.storage.s3.checksums import BinaryFile
from clipft.storage.s3.errors import Stopped


@dataclass(frozen=True)
class _Snapshot:
    """The files of a save in the state of that save, open until ``opened`` is closed."""

    step: int
    files: dict[str, BinaryFile]
    opened: ExitStack


class Uploader:
    """Uploads saves in a thread: ``saved`` returns at once, ``close`` waits for the last one."""

    def __init__(self, store: CheckpointStore, run: Run, keep: int, note: Note) -> None:
        self._store, self._run, self._keep, self._note = store, run, keep, note
        self._retry = store.bucket.retry
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._failed: _Snapshot | None = None
        self._busy = self._closing = self._warned = False
        self.saves = 0
        self.given_up = False
        """Whether ``close`` stopped waiting before the last save was uploaded."""
        self.error: StorageError | None = None
        """Why the last attempted save is not in the bucket; None if it is."""
        self._thread = threading.Thread(target=self._serve, name="checkpoints", daemon=True)
        self._thread.start()

    def saved(self, step: int, paths: Mapping[str, Path]) -> None:
        """Take over the files of a save, by their names; files that do not exist are skipped."""
        files: dict[str, BinaryFile] = {}
        opened = ExitStack()
        for name, path in paths.items():
            with suppress(FileNotFoundError):
                # A checkpoint is always replaced by a rename, which does not change an open file.
                # Other files, such as the metrics, grow in place.
                grows = path.suffix != ".pt"
                files[name] = BytesIO(path.read_bytes()) if grows else open(path, "rb")  # noqa: SIM115
                opened.callback(files[name].close)
        with self._changed:
            if self._waiting:
                self._waiting.opened.close()
            self._waiting = _Snapshot(step, files, opened)
            if self._retry.failing:  # the current upload is no longer needed
                self._retry.stopping.set()
            self.saves += 1
            self._changed.notify()

    def close(self, give_up: Callable[[], bool] = lambda: False) -> StorageError | None:
        """Wait until the last save is in the bucket, and try it once more if it failed before.
        ``give_up`` is called several times a second and returns whether to stop waiting.

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
        return self.error

    def abandon(self) -> None:
        """Stop the running upload, because the user wants to quit at once."""
        self._retry.stopping.set()

    def _serve(self) -> None:
        """Run the thread: upload saves until ``close`` is called, then the last failed one."""
        while True:
            with self._changed:
                self._busy = False
                while not self._waiting and not self._closing:
                    self._changed.wait()
                snapshot = self._waiting or self._failed
                if snapshot is None:
                    return
                if self._failed and self._failed is not snapshot:
                    self._failed.opened.close()  # a newer save replaces it
                self._waiting = self._failed = None
                self._busy, final = True, self._closing
                self._retry.stopping.clear()
            try:
                self._store.upload(snapshot.step, snapshot.files, self._run, self._keep)
                self.error = None
            except Stopped:  # a newer save is waiting
                pass
            except Exception as error:
                may_pass = isinstance(error, StorageError)
                if not isinstance(error, StorageError):
                    hint = "this is a bug: please report it"
                    error = StorageError(f"{self._store.url}: {error}", hint)
                self.error = StorageError(
                    f"the last checkpoint is not in the bucket: {error.message}",
                    f"the local file is intact and `clipft resume` uploads it again; {error.hint}",
                )
                if not self._warned:
                    self._warned = True
                    self._note(
                        f"warning: a checkpoint was not uploaded: {error.message}. "
                        "Training continues."
                    )
                if may_pass and not final:
                    self._failed = snapshot
                    continue
            snapshot.opened.close()
