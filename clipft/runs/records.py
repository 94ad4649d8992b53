"""The plain records that a run hands to those who watch it, and the callbacks' face."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clipft.core.common import Note, Progress, silent
from clipft.core.files import finite
from clipft.metrics.figures import mean_recall


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided once before it starts."""

    scenario: str
    model: str
    parameters: str
    trainable_parameters: int
    train_pairs: int
    val_pairs: int
    epochs: int
    steps_per_epoch: int
    warmup_steps: int
    effective_batch_size: int
    micro_batch_size: int
    device: str
    precision: str
    optimizer: str
    notes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Forecast:
    """What a run would take, measured on some of its own steps. Bytes and seconds; ``pairs`` a
    second. ``unusable``: pairs of both sides that are known to be left out.
    ``validation_seconds`` is of one pass over the validation pairs, of which the run makes
    ``validations``. ``disk_bytes``: at most in the output folder while a checkpoint replaces
    another one. ``saves``: how often the run writes a checkpoint.
    """

    plan: Plan
    done_steps: int
    unusable: int
    measured_steps: int
    seconds_per_step: float
    pairs_per_s: float
    data_share: float
    validations: int
    validation_seconds: float
    peak_bytes: int
    usable_bytes: int
    saves: int
    checkpoint_bytes: int
    best_bytes: int
    disk_bytes: int
    disk_free: int

    @property
    def seconds(self) -> float:
        """Of the whole run, without early stopping."""
        steps = max(0, self.plan.total_steps - self.done_steps)
        return steps * self.seconds_per_step + self.validations * self.validation_seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``step`` counts from 1 over the whole run, ``epoch`` from 1.

    ``loss`` is that of the whole effective batch; ``seconds`` includes ``data_seconds``,
    the wait for the batch. ``applied`` is False where the gradient was not finite.
    ``loss_floor`` is the least that any model's loss could be on these pairs.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    grad_norm: float
    pairs: int
    seconds: float
    data_seconds: float
    applied: bool
    skipped: tuple[dict[str, str], ...] = ()
    loss_floor: float = 0.0

    def metrics(self) -> dict[str, Any]:
        left_out = {"skipped", "applied"} | (set() if self.loss_floor else {"loss_floor"})
        values = {k: v for k, v in asdict(self).items() if k not in left_out}
        values["pairs_per_s"] = self.pairs / max(self.seconds, 1e-9)
        return {"kind": "step", **finite(values)}


@dataclass(frozen=True)
class EpochResult:
    """One epoch's end. ``epoch`` 0 is the untouched model, before any training."""

    epoch: int
    step: int
    train_loss: float | None
    val_loss: float
    retrieval: dict[str, Any]
    """As ``metrics.ranking.Retrieval.to_dict`` gives it."""
    improved: bool = False
    val_floor: float = 0.0
    """The least that any model's ``val_loss`` could be."""

    def recall(self) -> float:
        """Mean R@1/5/10 of both directions, in 0..1."""
        return mean_recall(self.retrieval)

    def metrics(self) -> dict[str, Any]:
        left_out = set() if self.val_floor else {"val_floor"}
        values = {k: v for k, v in asdict(self).items() if k not in left_out}
        return {"kind": "epoch", **finite(values)}


class TrainingCallback(Protocol):
    """Watches a run; never reaches back into it."""

    def started(self, plan: Plan, done_steps: int) -> None: ...

    def stepped(self, result: StepResult) -> None: ...

    def epoch_ended(self, result: EpochResult) -> None: ...

    def closed(self) -> None: ...


@dataclass
class Observers:
    """Several observers with the face of one."""

    members: list[TrainingCallback] = field(default_factory=list)

    def started(self, plan: Plan, done_steps: int) -> None:
        for member in self.members:
            member.started(plan, done_steps)

    def stepped(self, result: StepResult) -> None:
        for member in self.members:
            member.stepped(result)

    def epoch_ended(self, result: EpochResult) -> None:
        for member in self.members:
            member.epoch_ended(result)

    def closed(self) -> None:
        for member in reversed(self.members):
            member.closed()


@dataclass(frozen=True)
class RunRecords:
    """What a run left in its folder. ``result`` and ``evaluation`` are None until the run has
    ended, ``interpolation`` and ``kept`` until they were asked for; ``skipped`` holds at most
    so many as a page lists."""

    folder: str
    settings: list[dict[str, Any]]
    """Of each: section, name, value, default, changed."""
    run: dict[str, Any]
    """As ``reporting.run_record`` writes it."""
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    interpolation: dict[str, Any] | None
    kept: dict[str, Any] | None
    skipped: list[dict[str, Any]]
    skipped_counts: dict[str, int]

    def setting(self, name: str) -> Any:
        return next(entry["value"] for entry in self.settings if entry["name"] == name)


@dataclass(frozen=True)
class Callbacks:
    """Observers of the run, notes for people, each saved checkpoint."""

    callback: TrainingCallback
    note: Note
    saved: Callable[[Path, int], None]
    """With the number of optimizer steps done."""
    progress: Progress = silent
