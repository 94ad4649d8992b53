"""What of a run is saved on its way: the newest state, and the best epoch's weights."""

import math
from collections.abc import Callable
from typing import Any

from clipft.core.errors import ClipftError
from clipft.core.files import settle
from clipft.runs.checkpoint import save_checkpoint
from clipft.training.checkpoint_pair import save_newest
from clipft.distributed.collectives import by_first
from clipft.runs.folder import RunPaths
from clipft.training.state import RunState
from clipft.training.setup import RunSetup
from clipft.training.loop import TrainState
from clipft.training.watchers import Watchers

_BLANK = {"epoch": 0, "step_in_epoch": 0, "step": 0, "model_state_dict": {}, "loss": 0.0}
"""Where nothing trains; and of a state, what weights alone come with."""


class Saver:
    """Of one run. All processes must ask, as each may hold a part of the weights; the first
    one writes."""

    def __init__(
        self, state: RunState, setup: RunSetup, paths: RunPaths, watchers: Watchers
    ) -> None:
        self.state, self.setup, self.paths, self.watchers = state, setup, paths, watchers
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
        by_first(self.setup.processes, lambda: self._write(state_dict))
        self.saved_step = self.state.step

    def save_best(self, training: TrainState) -> None:
        """The weights alone."""
        state_dict = self.setup.weights.now(training.weights_dict)
        by_first(self.setup.processes, lambda: self._write_best(state_dict))

    def _state_dict(self) -> Callable[[], dict[str, Any]]:
        training = self.state.training
        return self.setup.weights.now(training.state_dict) if training else _BLANK.copy

    def _write(self, state_dict: Callable[[], dict[str, Any]]) -> None:
        # After a power cut no checkpoint may be newer than the lines of its steps
        settle(self.paths.folder, self.paths.metrics.name, self.paths.skipped.name)
        save_newest(self.paths.checkpoint, self._content(state_dict()))
        self.watchers.saved(self.paths.checkpoint, self.state.step)

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
