"""Saves the newest state of a run, and the weights of its best epoch.

The newest state (``{scenario}_checkpoint.pt``) is saved at the end of each epoch, every
``checkpoint_every`` steps, and when a signal or an error ends the run. The best epoch's weights
(``best.pt``) are saved when ``EarlyStopping`` finds that an epoch has improved.

A thread writes a copy of the newest state, flushes it to the disk and reads it back, while training
goes on. Training waits for the last save of a run, and for a state that is too large to be copied.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from clipft.core.errors import ClipftError, ModelError
from clipft.core.files import settle
from clipft.core.memory import memory_in_use, usable_memory
from clipft.distributed.rank_zero import on_rank_zero
from clipft.runs.checkpoint import load_checkpoint, save_checkpoint, save_newest
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks
from clipft.training.setup import RunSetup
from clipft.training.state import RunState, TrainState

_BLANK = {"epoch": 0, "step_in_epoch": 0, "step": 0, "model_state_dict": {}, "loss": 0.0}
"""The state of a scenario that trains nothing; its keys are those of weights without a state."""
_MOST_COPIED = 0.25
"""The largest share of the free memory that a copy of the optimizer's state may take."""


def is_save_due(step: int, steps_per_epoch: int, every: int) -> bool:
    """Return whether a run saves its state after ``step``: at the end of an epoch, and every
    ``every`` steps (0: only at the end of epochs). ``train --plan`` counts saves with it."""
    return step % steps_per_epoch == 0 or (every > 0 and step % every == 0)


class Saver:
    """Saves the state of a run. Rank zero writes, but all processes must call these methods,
    because with sharded weights each process holds a part of the weights.

    If a file cannot be written, the next save raises the error on all processes.
    """

    def __init__(
        self, state: RunState, setup: RunSetup, paths: RunPaths, callbacks: Callbacks
    ) -> None:
        self.state, self.setup, self.paths, self.callbacks = state, setup, paths, callbacks
        self.saved_step = 0
        """The step of the newest checkpoint, which the thread may not have finished yet. If the run
        is killed, later steps are lost."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[int] | None = None

    def save_if_due(self, training: TrainState) -> None:
        """Save at the end of an epoch, and every ``checkpoint_every`` steps.

        The decision must be the same on all processes, because they save together, so it depends
        only on the step. A rule based on time would have to be decided ``on_rank_zero``.
        """
        setup, writing = self.setup, self._writing
        if writing and writing.done() and not writing.exception():
            self._end_writing()
        due = is_save_due(training.step, setup.epoch_plan.steps, setup.settings.checkpoint_every)
        if due and math.isfinite(training.loss):  # never replace a good state with a bad one
            self.save(wait=False)

    def save_after(self, error: ClipftError, training: TrainState) -> None:
        """Save the steps that would be lost because of ``error``, if possible."""
        if training.step <= self.saved_step or not math.isfinite(training.loss):
            return
        if not error.alone:
            self.save()
        elif self.setup.processes.rank == 0 and not self.setup.weights.sharded:
            self._write(training.state_dict)  # alone: other processes do not know of the error

    def save_rest(self) -> None:
        """Save the steps since the last save, and wait until everything is written."""
        if self.state.step > self.saved_step:
            self.save()
        else:
            on_rank_zero(self.setup.processes, self._end_writing)

    def save(self, wait: bool = True) -> None:
        """Save the newest state. Without ``wait``, return while the thread still writes it."""
        training, weights = self.state.training, self.setup.weights
        state = weights.gather_if_sharded(training.state_dict) if training else _BLANK.copy
        on_rank_zero(self.setup.processes, lambda: self._write(state, wait))
        self.saved_step = self.state.step

    def close(self) -> None:
        """Wait for the file that is being written, because the run ends with an error."""
        with suppress(ClipftError):  # the run's own error matters more
            self._end_writing()
        self._thread.shutdown()

    def save_best(self, training: TrainState) -> None:
        """Save only the weights, as those of the best epoch."""
        state = self.setup.weights.gather_if_sharded(training.weights_dict)

        def write() -> None:
            full = state()
            content = self._content({key: full[key] for key in _BLANK})
            save_checkpoint(self.paths.best, {**content, "finished": False})

        on_rank_zero(self.setup.processes, write)

    def _write(self, state: Callable[[], dict[str, Any]], wait: bool = True) -> None:
        self._end_writing()
        content, step = self._content(state()), self.state.step
        if not wait and not self.setup.weights.sharded:  # sharded weights were copied together
            wait = not _copy_optimizer_state(content)

        def write() -> int:
            # After a power cut, the lines of all steps in a checkpoint must be on disk
            settle(self.paths.folder, self.paths.metrics.name, self.paths.skipped.name)
            save_newest(self.paths.checkpoint, content)
            return step

        self._writing = self._thread.submit(write)
        if wait:
            self._end_writing()

    def _end_writing(self) -> None:
        """If a checkpoint is being written, wait until it is complete, and report it.

        Raises:
            StorageError: it could not be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            self.callbacks.saved(self.paths.checkpoint, writing.result())

    def _content(self, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            **weights,
            "settings": self.setup.settings.model_dump(mode="json"),
            "base_model": self.setup.loaded.identity,
            "data": self.setup.train.identity(),
            "general_data": self.setup.held.identity,
            "train_pairs": len(self.setup.train),
            "choices": asdict(self.setup.choices),
            **self.state.state_dict(),
        }


def _copy_optimizer_state(content: dict[str, Any]) -> bool:
    """Replace the optimizer's state by a copy on the CPU, which later steps do not change.

    The weights are copied already. Returns False, and copies nothing, if the copy would take more
    than a quarter of the free memory.
    """
    optimizer = content.get("optimizer_state_dict")
    if not optimizer:
        return True
    states = optimizer["state"]
    size = sum(v.nbytes for state in states.values() for v in state.values() if torch.is_tensor(v))
    cpu = torch.device("cpu")
    if size > _MOST_COPIED * (usable_memory(cpu) - memory_in_use(cpu)):
        return False
    copies = dict[int, torch.Tensor]()

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        if id(value) not in copies:  # the 8-bit states of several weights share a tensor
            copies[id(value)] = value.to(cpu, copy=True)
        return copies[id(value)]

    content["optimizer_state_dict"] = {
        "state": {n: {k: copy(v) for k, v in state.items()} for n, state in states.items()},
        "param_groups": [dict(group) for group in optimizer["param_groups"]],
    }
    return True


def load_best(path: Path, epoch: int) -> dict[str, Any]:
    """Load the weights of the best epoch.

    Raises:
        ModelError: they are damaged.
    """
    try:
        return load_checkpoint(path)
    except ModelError as error:
        raise ModelError(
            f"{error.message}: the weights of epoch {epoch}, the best one so far, are lost",
            f"restore a copy of {path.name}, or remove it: `clipft resume` then keeps the best of "
            "the remaining epochs",
        ) from error


class Best(Enum):
    """The state of ``best.pt`` when a run is resumed."""

    THERE = "the weights of the best epoch"
    LATER = "the weights of a later epoch, which the run will repeat"
    GONE = "nothing, or the weights of another epoch"


def find_best(path: Path, epoch: int, step: int, replaceable: bool) -> Best:
    """Look for the weights of ``epoch``, which is the best one as of the checkpoint of ``step``.

    ``replaceable``: the checkpoint holds the same weights, so a damaged file counts as missing.

    Raises:
        ModelError: the file is damaged and not replaceable.
    """
    if not path.exists():
        return Best.GONE
    try:
        content = load_best(path, epoch)
    except ModelError:
        if replaceable:
            return Best.GONE
        raise
    if content["epoch"] == epoch:
        return Best.THERE
    return Best.LATER if content.get("step", 0) > step else Best.GONE
