"""The state of a run between two steps. A checkpoint contains this state and the settings."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipft.config.sections.data import DataSettings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.batch import StepBatch
from clipft.data.order import Position
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_rank_zero
from clipft.models.trainable import TrainableModel
from clipft.runs.folder import RunPaths, append_lines
from clipft.runs.records import EpochResult
from clipft.training.step.average import NO_AVERAGE, WeightAverage
from clipft.training.step.optimizer import Optimizer


@dataclass
class TrainState:
    """Model, optimizer and position: everything that changes from step to step.

    ``step`` counts the optimizer steps done; ``loss`` is that of the last step. ``epoch_loss_sum``
    is the sum of the losses of the epoch's ``epoch_pairs`` pairs. ``average`` is that of the
    weights. ``look_alikes`` are those of the epoch, int32 [pairs, any], if each epoch finds its
    own; finding them took ``look_alike_seconds``.
    """

    model: TrainableModel
    optimizer: Optimizer
    steps_per_epoch: int
    average: WeightAverage = NO_AVERAGE
    step: int = 0
    position: Position = field(default_factory=Position)
    loss: float = float("nan")
    epoch_loss_sum: float = 0.0
    epoch_pairs: int = 0
    look_alikes: Tensor | None = None
    look_alike_seconds: float | None = None

    @property
    def epoch_ended(self) -> bool:
        """True between the last step of an epoch and the first of the next."""
        return self.step > 0 and self.position.step == 0

    @property
    def mean_loss(self) -> float:
        """The mean training loss of the epoch's pairs. Steps are weighted by their number of pairs;
        steps whose loss is NaN do not count, because they were not applied."""
        return self.epoch_loss_sum / self.epoch_pairs if self.epoch_pairs else math.nan

    def advance(self, batch: StepBatch, loss: float) -> None:
        """Count the step that was just done."""
        self.step += 1
        self.loss = loss
        if batch.step == 0:
            self.epoch_loss_sum, self.epoch_pairs = 0.0, 0
        if math.isfinite(loss):
            self.epoch_loss_sum += loss * batch.pairs
            self.epoch_pairs += batch.pairs
        last = batch.step + 1 == self.steps_per_epoch
        self.position = Position(batch.epoch + last, 0 if last else batch.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs, complete on rank zero. With sharded weights, all
        processes must call this."""
        state = {**self.weights_dict(), **self.optimizer.state_dict()}
        if self.average.kept:
            state["trained_state_dict"] = self.optimizer.weights.model_state(self.model)
        if self.look_alikes is not None:  # they cannot be found again: the weights have changed
            state["look_alikes"] = self.look_alikes
        return state

    def weights_dict(self) -> dict[str, Any]:
        """Return ``state_dict`` without the parts that only resuming needs. The weights are the
        averages, if there are any."""
        with self.average.in_place():
            weights = self.optimizer.weights.model_state(self.model)
        return {
            "epoch": self.position.epoch,
            "step_in_epoch": self.position.step,
            "step": self.step,
            "loss": self.loss,
            "epoch_loss_sum": self.epoch_loss_sum,
            "epoch_pairs": self.epoch_pairs,
            "model_state_dict": weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ModelError: the state belongs to another model or another optimizer.
        """
        self.optimizer.weights.load_model_state(self.model, state["model_state_dict"])
        if self.average.kept:
            self.average.restart()
            self.optimizer.weights.load_model_state(self.model, state["trained_state_dict"])
        self.optimizer.load_state_dict(state)
        self.position = Position(state["epoch"], state["step_in_epoch"])
        self.step, self.loss = state["step"], state["loss"]
        self.look_alikes = state.get("look_alikes")
        self.epoch_loss_sum, self.epoch_pairs = state["epoch_loss_sum"], state["epoch_pairs"]


@dataclass
class EarlyStopping:
    """Stops after ``patience`` epochs that did not improve by more than ``min_delta``.

    ``watches`` is ``loss`` (of validation), ``recall`` (its mean), ``accuracy``, or ``never``. With
    ``never``, only the epoch with the lowest loss is remembered. NaN counts as the worst value.
    """

    watches: str
    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    def update(self, result: EpochResult) -> bool:
        """Record an epoch; return True if it is better than the best one so far."""
        value = result.val_loss
        if self.watches == "recall":
            value = -result.recall()
        elif self.watches == "accuracy":
            value = math.nan if result.accuracy is None else -result.accuracy
        improved = value < self.best - self.min_delta  # False for NaN
        if improved:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return improved

    @property
    def should_stop(self) -> bool:
        return self.watches != "never" and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class SkippedPairs:
    """The pairs of a run that could not be used, listed in ``path``.

    ``count`` is the number of skipped training pairs, of ``pairs`` in all.
    """

    def __init__(
        self, path: Path, pairs: int, settings: DataSettings, processes: Processes
    ) -> None:
        self.path, self.count = path, 0
        self._pairs, self._settings, self._processes = pairs, settings, processes

    def write(self, split: str, step: int, skipped: Iterable[dict[str, str]]) -> None:
        """Append pairs to ``skipped.jsonl``, as skipped after ``step`` optimizer steps."""
        lines = [{"split": split, "step": step, **entry} for entry in skipped]
        on_rank_zero(self._processes, lambda: append_lines(self.path, lines))

    def add(self, epoch: int, step: int, skipped: Sequence[dict[str, str]]) -> None:
        """Count the skipped pairs of a training step and write them to the file.

        Only the first epoch counts, because later epochs skip the same pairs again.

        Raises:
            DataError: there are now more than ``max_bad`` allows.
        """
        if not skipped or epoch > 1:
            return
        self.count += len(skipped)
        self.write("train", step, skipped)
        last = skipped[-1]
        if self._settings.too_many_bad(self.count, self._pairs):
            raise DataError(
                f"{counted(self.count, 'pair')} could not be used, more than --max-bad "
                f"{self._settings.max_bad:g} of {self._pairs}: the last was {last['key']} in "
                f"{last['shard']} ({last['reason']})",
                f"see {self.path}; repair the data, or raise --max-bad",
            )


@dataclass
class RunState:
    """A run between two steps.

    ``training`` is None in a scenario that trains nothing. ``validated`` is False while the
    validation of the last epoch is still missing. ``best`` is None until an epoch has improved.
    """

    training: TrainState | None
    stopping: EarlyStopping
    skipped: SkippedPairs
    before: EpochResult | None = None
    best: EpochResult | None = None
    validated: bool = True
    finished: bool = False

    @property
    def step(self) -> int:
        return self.training.step if self.training else 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint contains besides ``training``, as plain values."""
        assert self.before
        return {
            "early_stopping": self.stopping.state_dict(),
            "before": asdict(self.before),
            "best": asdict(self.best) if self.best else None,
            "skipped_pairs": self.skipped.count,
            "validated": self.validated,
            "finished": self.finished,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Load a whole checkpoint. ``finished`` is left out: a finished run may be extended."""
        if self.training:
            self.training.load_state_dict(checkpoint)
        self.stopping.load_state_dict(checkpoint["early_stopping"])
        self.before = EpochResult(**checkpoint["before"])
        self.best = EpochResult(**checkpoint["best"]) if checkpoint["best"] else None
        self.skipped.count = checkpoint["skipped_pairs"]
        self.validated = checkpoint.get("validated", True)


@dataclass(frozen=True)
class TrainResult:
    """Figures of the pretrained model and of the best epoch, None if no epoch improved."""

    before: EpochResult
    best: EpochResult | None
    steps: int
    stopped_early: bool
    skipped_pairs: int
    folder: Path
    checkpoint: Path

    def to_dict(self) -> dict[str, Any]:
        """The result as ``result.json`` and ``clipft train --json`` show it."""
        return {
            "before": self.before.retrieval,
            "after": self.best.retrieval if self.best else None,
            "val_loss_before": self.before.val_loss,
            "val_loss_after": self.best.val_loss if self.best else None,
            "best_epoch": self.best.epoch if self.best else None,
            "steps": self.steps,
            "stopped_early": self.stopped_early,
            "skipped_pairs": self.skipped_pairs,
            "run_dir": str(self.folder),
            "checkpoint": str(self.checkpoint),
        }

    @classmethod
    def of(cls, state: RunState, paths: RunPaths) -> "TrainResult":
        """Return the result of a run that has trained to its end."""
        assert state.before
        return cls(
            before=state.before,
            best=state.best,
            steps=state.step,
            stopped_early=state.stopping.should_stop,
            skipped_pairs=state.skipped.count,
            folder=paths.folder,
            checkpoint=paths.checkpoint,
        )

    @classmethod
    def of_finished(cls, checkpoint: dict[str, Any], paths: RunPaths) -> "TrainResult":
        """Return the result of a run whose checkpoint says that it has finished."""
        best = checkpoint["best"]
        return cls(
            before=EpochResult(**checkpoint["before"]),
            best=EpochResult(**best) if best else None,
            steps=checkpoint["step"],
            stopped_early=checkpoint["epoch"] < checkpoint["settings"]["epochs"],
            skipped_pairs=checkpoint["skipped_pairs"],
            folder=paths.folder,
            checkpoint=paths.checkpoint,
        )
