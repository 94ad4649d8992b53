"""What of a run is saved on its way: the newest state, and the best epoch's weights."""

import math
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from clipft.config.settings import Settings, fixed_on_resume
from clipft.core.common import Note
from clipft.core.errors import ClipftError, ModelError, UsageError
from clipft.core.files import disk_error, settle
from clipft.distributed.rank_zero import on_rank_zero
from clipft.runs.checkpoint import (
    NewestCheckpoint,
    check_base_model,
    check_resumable,
    checkpoint_exists,
    load_checkpoint,
    load_newest,
    previous_of,
    restore_previous,
    save_checkpoint,
    save_newest,
)
from clipft.runs.folder import RunPaths, cut_lines
from clipft.runs.records import Callbacks
from clipft.training.loop import TrainState
from clipft.training.setup import RunSetup
from clipft.training.state import RunState

_BLANK = {"epoch": 0, "step_in_epoch": 0, "step": 0, "model_state_dict": {}, "loss": 0.0}
"""Where nothing trains; and of a state, what weights alone come with."""


class Saver:
    """Of one run. All processes must ask, as each may hold a part of the weights; the first
    one writes."""

    def __init__(
        self, state: RunState, setup: RunSetup, paths: RunPaths, callbacks: Callbacks
    ) -> None:
        self.state, self.setup, self.paths, self.callbacks = state, setup, paths, callbacks
        self.saved_step = 0
        """Of the newest checkpoint, where it has all that is known."""

    def save_if_due(self, training: TrainState) -> None:
        every = self.setup.settings.checkpoint_every
        due = training.epoch_ended or (every and training.step % every == 0)
        if due and math.isfinite(training.loss):  # never in the place of a good state
            self.save()

    def save_after(self, error: ClipftError, training: TrainState) -> None:
        """What ``error`` would take away."""
        if training.step <= self.saved_step or not math.isfinite(training.loss):
            return
        if not error.alone:
            self.save()
        elif self.setup.processes.rank == 0 and not self.setup.weights.sharded:
            self._write(self._state_dict())

    def save(self) -> None:
        state_dict = self._state_dict()
        on_rank_zero(self.setup.processes, lambda: self._write(state_dict))
        self.saved_step = self.state.step

    def save_best(self, training: TrainState) -> None:
        """The weights alone."""
        state_dict = self.setup.weights.now(training.weights_dict)
        on_rank_zero(self.setup.processes, lambda: self._write_best(state_dict))

    def _state_dict(self) -> Callable[[], dict[str, Any]]:
        training = self.state.training
        return self.setup.weights.now(training.state_dict) if training else _BLANK.copy

    def _write(self, state_dict: Callable[[], dict[str, Any]]) -> None:
        # After a power cut no checkpoint may be newer than the lines of its steps
        settle(self.paths.folder, self.paths.metrics.name, self.paths.skipped.name)
        save_newest(self.paths.checkpoint, self._content(state_dict()))
        self.callbacks.saved(self.paths.checkpoint, self.state.step)

    def _write_best(self, state_dict: Callable[[], dict[str, Any]]) -> None:
        weights = state_dict()
        content = self._content({key: weights[key] for key in _BLANK})
        save_checkpoint(self.paths.best, {**content, "finished": False})

    def _content(self, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            **weights,
            "settings": self.setup.settings.model_dump(mode="json"),
            "base_model": self.setup.loaded.identity,
            "data": self.setup.train.identity(),
            "train_pairs": len(self.setup.train),
            **self.state.progress(),
        }


class Best(Enum):
    """What ``best.pt`` is to a run that goes on."""

    THERE = "the weights of the best epoch"
    LATER = "those of an epoch that the run, killed after it, makes again"
    GONE = "not there, or of another epoch"


def load_best(path: Path, epoch: int) -> dict[str, Any]:
    """
    Raises:
        ModelError: it is damaged; with whose weights are lost and what can be done.
    """
    try:
        return load_checkpoint(path)
    except ModelError as error:
        raise ModelError(
            f"{error.message}: the weights of epoch {epoch}, the best one so far, are lost",
            f"put a copy of {path.name} back; or remove it, and `clipft resume` takes the best of "
            "the epochs from the checkpoint's on",
        ) from error


def find_best(path: Path, epoch: int, step: int, mendable: bool) -> Best:
    """``epoch`` is the best one as the checkpoint of ``step`` knows it. ``mendable``: a damaged
    file counts as gone.

    Raises:
        ModelError: as ``load_best``.
    """
    if not path.exists():
        return Best.GONE
    try:
        content = load_best(path, epoch)
    except ModelError:
        if mendable:
            return Best.GONE
        raise
    if content["epoch"] == epoch:
        return Best.THERE
    return Best.LATER if content.get("step", 0) > step else Best.GONE


def checkpoint_to_resume(
    settings: Settings, paths: RunPaths, note: Note
) -> NewestCheckpoint | None:
    """The checkpoint to go on from; None: start from scratch. Nothing is changed.

    Raises:
        ModelError: one is there but none can be gone on from.
        UsageError: a setting that decides the weights was changed.
    """
    if not settings.resume_from_checkpoint:
        return None
    if not checkpoint_exists(paths.checkpoint):
        note(f"warning: no checkpoint {paths.checkpoint}: starting at epoch 0.")
        return None
    whole = load_newest(paths.checkpoint)
    check_resumable(whole.path, whole.content)
    _refuse_changes(whole.content["settings"], settings)
    return whole


def go_back_to(whole: NewestCheckpoint, checkpoint: Path, note: Note) -> None:
    """Where the newest is damaged, the one before it takes its place."""
    if not whole.damage:
        return
    aside = restore_previous(checkpoint)
    kept = f"; the damaged one is now {aside}" if aside else ""
    step = whole.content.get("step", 0)
    note(f"warning: {whole.damage.message}; going on from the one before it, of step {step}{kept}.")


def set_aside(paths: RunPaths, note: Note) -> None:
    """What an earlier run left is not of the one that starts from scratch. Where it has weights,
    all of it is kept in a folder of its own.

    Raises:
        StorageError: the disk refuses.
    """
    checkpoints = (paths.checkpoint, previous_of(paths.checkpoint))
    there = [path for path in (*checkpoints, *paths.contents()) if path.exists()]
    if not {*checkpoints, paths.best}.intersection(there):
        for path in there:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        return
    kept = paths.unused_earlier()
    try:
        kept.mkdir()
        for path in there:
            path.replace(kept / path.name)
    except OSError as error:
        raise disk_error(kept, error) from error
    note(f"The earlier run in {paths.folder} is kept as {kept}.")


def cut_back(paths: RunPaths, checkpoint: dict[str, Any]) -> None:
    """Lines of what came after the checkpoint are written again."""
    epochs = checkpoint["epoch"] - (not checkpoint.get("validated", True))
    for path in (paths.metrics, paths.skipped):
        cut_lines(path, checkpoint["step"], epochs)


def check_same_run(checkpoint: dict[str, Any], setup: RunSetup) -> None:
    """
    Raises:
        UsageError: another base model, or other training pairs.
    """
    check_base_model(checkpoint, setup.loaded.identity, UsageError)
    if checkpoint["data"] != setup.train.identity():
        raise UsageError(
            f"the training shards in {setup.settings.data_dir} are not those of the checkpoint",
            "name the folder with the same shards with --data-dir, or start a new run",
        )


def _refuse_changes(saved: dict[str, Any], settings: Settings) -> None:
    now = settings.model_dump(mode="json")
    changed = [name for name in fixed_on_resume() if name in saved and saved[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} {saved[name]} -> {now[name]}" for name in changed)
        raise UsageError(
            f"these settings decide the weights and cannot change on resume: {listed}",
            "set them back, or start a new run with another --output-dir",
        )
