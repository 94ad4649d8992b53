"""Saved checkpoints go to the bucket behind the training's back.

Training hands over open files and goes on: a newer save that is renamed over them changes
nothing. One upload runs at a time, one may wait; a newer one takes the waiting one's place, and
that of one that keeps failing. What failed is warned of once and tried again at the end.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from clipft.core.errors import StorageError
from clipft.storage.s3.checkpoints import CheckpointStore, Run
from clipft.storage.s3.checksums import BinaryFile
from clipft.storage.s3.errors import Stopped

_REPLACED_WHOLE = ".pt"
"""Such files get new bytes by a rename alone: an open one stays as it is. Others grow."""


@dataclass
class _Waiting:
    """The files of a save as they were then."""

    step: int
    files: dict[str, BinaryFile]
    held: ExitStack

    @staticmethod
    def of(step: int, paths: Mapping[str, Path]) -> "_Waiting":
        held = ExitStack()
        files = dict[str, BinaryFile]()
        for name, path in paths.items():
            with suppress(FileNotFoundError):
                whole = path.suffix == _REPLACED_WHOLE
                file: BinaryFile = BytesIO(b"" if whole else path.read_bytes())
                if whole:
                    file = open(path, "rb")  # noqa: SIM115
                held.enter_context(file)
                files[name] = file
        return _Waiting(step, files, held)


class Uploader:
    """``saved`` returns at once; ``close`` waits for the last upload."""

    def __init__(
        self, store: CheckpointStore, run: Run, keep: int, say: Callable[[str], None]
    ) -> None:
        self._store, self._run, self._keep, self._say = store, run, keep, say
        self._patience = store.bucket.patience
        self._changed = threading.Condition()
        self._waiting: _Waiting | None = None
        self._unsent: _Waiting | None = None
        self._busy = self._closing = self._warned = False
        self._error: StorageError | None = None
        self._thread = threading.Thread(target=self._serve, name="checkpoints", daemon=True)
        self._thread.start()
        self.saves = 0
        self.given_up = False
        """The last save was not waited for."""

    def saved(self, step: int, paths: Mapping[str, Path]) -> None:
        """The files of a save, by their names; those that do not exist are left out."""
        with self._changed:
            _let_go(self._waiting)
            self._waiting = _Waiting.of(step, paths)
            self._patience.stop_if_failing()
            self.saves += 1
            self._changed.notify()

    def close(self, give_up: Callable[[], bool] = lambda: False) -> StorageError | None:
        """Wait until the last save is in the bucket, one that failed tried once more, or until
        ``give_up``; what is the matter if it is not."""
        with self._changed:
            self._closing = True
            if self._waiting or self._unsent or self._busy:
                self._say(f"Waiting for the last checkpoint to arrive at {self._store.url} ...")
            self._changed.notify()
        while self._thread.is_alive():
            if give_up():
                self.given_up = True
                self.abandon()
                return StorageError("the last checkpoint was not waited for", "upload it again")
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
        """Let go of everything: the user wants to leave at once."""
        self._patience.stopping.set()

    def _serve(self) -> None:
        while (waiting := self._next()) is not None:
            self._bring(waiting, final=self._closing)

    def _next(self) -> _Waiting | None:
        with self._changed:
            self._busy = False
            while not self._waiting and not self._closing:
                self._changed.wait()
            waiting = self._waiting or self._unsent
            if self._unsent is not waiting:
                _let_go(self._unsent)
            self._waiting = self._unsent = None
            self._busy = waiting is not None
            self._patience.stopping.clear()
            return waiting

    def _bring(self, waiting: _Waiting, final: bool) -> None:
        try:
            self._store.upload(waiting.step, waiting.files, self._run, self._keep)
            self._error = None
        except Stopped:  # a newer one waits
            pass
        except StorageError as error:
            self._failed(error)
            if not final:
                self._unsent = waiting
                return
        except Exception as error:
            self._failed(StorageError(f"{self._store.url}: {error}", "this is a bug: report it"))
        _let_go(waiting)

    def _failed(self, error: StorageError) -> None:
        self._error = StorageError(
            f"the last checkpoint is not in the bucket: {error.message}",
            f"the local file is whole and `clipft resume` sends it again; {error.hint}",
        )
        if not self._warned:
            self._warned = True
            self._say(f"warning: a checkpoint was not uploaded: {error.message}. Training goes on.")


def _let_go(waiting: _Waiting | None) -> None:
    if waiting:
        waiting.held.close()
