"""The training loop."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipft.config.settings import DataSettings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.loader import StepBatch, training_batches
from clipft.data.order import Position
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_rank_zero, steps_in_lockstep
from clipft.models.trainable import TrainableModel
from clipft.runs.folder import append_lines
from clipft.runs.records import StepResult
from clipft.training.setup import RunSetup
from clipft.training.step.gradcache import Accumulation
from clipft.training.step.optimizer import Optimiser


class BadPairs:
    """Of one run, in ``path``; ``count`` of those to train on."""

    def __init__(
        self, path: Path, pairs: int, settings: DataSettings, processes: Processes
    ) -> None:
        self.path, self.count = path, 0
        self._pairs, self._settings, self._processes = pairs, settings, processes

    def list(self, split: str, step: int, skipped: Iterable[dict[str, str]]) -> None:
        """Note them as left out when ``step`` optimizer steps were done."""
        lines = [{"split": split, "step": step, **entry} for entry in skipped]
        on_rank_zero(self._processes, lambda: append_lines(self.path, lines))

    def met(self, epoch: int, step: int, skipped: Sequence[dict[str, str]]) -> None:
        """In a step of training. Only the first epoch counts: later ones meet the same again.

        Raises:
            DataError: they are too many by now.
        """
        if not skipped or epoch > 1:
            return
        self.count += len(skipped)
        self.list("train", step, skipped)
        last = skipped[-1]
        if self._settings.too_many_bad(self.count, self._pairs):
            raise DataError(
                f"{counted(self.count, 'pair')} could not be used, more than --max-bad "
                f"{self._settings.max_bad:g} of {self._pairs}: the last was {last['key']} in "
                f"{last['shard']} ({last['reason']})",
                f"see {self.path}; mend the data, or raise --max-bad",
            )


@dataclass
class TrainState:
    """All that changes while training."""

    model: TrainableModel
    optimiser: Optimiser
    steps_per_epoch: int
    step: int = 0
    position: Position = field(default_factory=Position)
    loss: float = float("nan")
    epoch_loss_sum: float = 0.0

    @property
    def epoch_ended(self) -> bool:
        return self.step > 0 and self.position.step == 0

    @property
    def mean_loss(self) -> float:
        """Of an epoch that has ended."""
        return self.epoch_loss_sum / self.steps_per_epoch

    def advance(self, batch: StepBatch, loss: float) -> None:
        self.step += 1
        self.loss = loss
        self.epoch_loss_sum = loss + (self.epoch_loss_sum if batch.step else 0.0)
        last = batch.step + 1 == self.steps_per_epoch
        self.position = Position(batch.epoch + last, 0 if last else batch.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Whole on the first process; where weights are sharded, all must ask."""
        return {**self.weights_dict(), **self.optimiser.state_dict()}

    def weights_dict(self) -> dict[str, Any]:
        """``state_dict`` without what only going on needs."""
        return {
            "epoch": self.position.epoch,
            "step_in_epoch": self.position.step,
            "step": self.step,
            "loss": self.loss,
            "epoch_loss_sum": self.epoch_loss_sum,
            "model_state_dict": self.optimiser.weights.model_state(self.model),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.weights.load_model_state(self.model, state["model_state_dict"])
        self.optimiser.load_state_dict(state)
        self.position = Position(state["epoch"], state["step_in_epoch"])
        self.step, self.loss = state["step"], state["loss"]
        self.epoch_loss_sum = state["epoch_loss_sum"]


def fit(
    state: TrainState, batches: Iterable[StepBatch], accumulate: Accumulation
) -> Generator[StepResult, None, None]:
    """Learn from each batch, empty it and tell of it; the caller shows, saves, evaluates."""
    state.model.train()
    started = time.perf_counter()
    for batch in batches:
        got_data = time.perf_counter()

        loss = float(accumulate(state.step, batch.micro_batches))
        floor = accumulate.floor(batch.micro_batches)
        update = state.optimiser.update()
        state.model.clamp_logit_scale()

        state.advance(batch, loss)
        batch.micro_batches.clear()  # gone before the next ones are read
        ended = time.perf_counter()
        yield StepResult(
            epoch=batch.epoch + 1,
            step=state.step,
            loss=loss,
            lr=update.lr,
            grad_norm=update.grad_norm,
            pairs=batch.pairs,
            seconds=ended - started,
            data_seconds=got_data - started,
            applied=update.applied,
            skipped=tuple(asdict(skipped) for skipped in batch.skipped),
            loss_floor=floor,
        )
        started = time.perf_counter()


def run_steps(setup: RunSetup, state: TrainState, bad: BadPairs) -> Iterator[StepBatch]:
    """
    Raises:
        DataError: none of a step's pairs can be used; they are listed among the ``bad``.
    """
    batches = training_batches(
        setup.train,
        setup.encoding.preprocessing,
        setup.epoch_plan,
        state.position,
        setup.plan.epochs,
        setup.loader_options,
    )
    for batch in steps_in_lockstep(setup.processes, batches):
        if not batch.pairs:
            skipped = [asdict(skipped) for skipped in batch.skipped]
            bad.met(batch.epoch + 1, state.step, skipped)
            pairs = counted(len(batch.skipped), "pair")
            raise DataError(
                f"none of the {pairs} of step {state.step + 1} can be used",
                f"see {bad.path}; mend the data, or take a larger --effective-batch-size",
            )
        yield batch
