"""The reports of a run while it trains: its plan, steps and epochs, and the callbacks for them."""

from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipft.core.common import Note, Progress, silent
from clipft.core.files import finite
from clipft.metrics.figures import mean_recall
from clipft.runs.judgments import Tally


@dataclass(frozen=True)
class Plan:
    """The plan of a run, made once before it starts."""

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
class Usage:
    """What ``seconds`` of a run take: hours of all its devices and, if a price is known, money."""

    plan: Plan
    seconds: float
    price_per_hour: float | None = None

    @property
    def device_hours(self) -> float:
        """Hours of all GPUs. Processes without a GPU share one machine, whose hours these are."""
        devices = self.plan.processes if self.plan.device.startswith("cuda") else 1
        return self.seconds / 3600 * devices

    def to_dict(self) -> dict[str, float]:
        """Return ``device_hours`` and, if a price is known, ``cost``."""
        hours = self.device_hours
        priced = {} if self.price_per_hour is None else {"cost": hours * self.price_per_hour}
        return {"device_hours": hours, **priced}

    def __str__(self) -> str:
        kind = "GPU" if self.plan.device.startswith("cuda") else "machine"
        hours = f"{self.device_hours:.2g} {kind} hours"
        if self.price_per_hour is None:
            return hours
        return f"{hours}, {self.to_dict()['cost']:,.2f} at {self.price_per_hour:g} an hour"


@dataclass(frozen=True)
class Choices:
    """The automatic choices of a run at its start, which it keeps when it is resumed elsewhere.

    ``precision`` and ``optimizer`` were chosen by ``auto`` for the hardware ("" is unknown), and
    ``smallest_step`` is the fewest pairs in a step (0: not chosen yet). ``look_alikes``, int32
    [pairs, any], are those of each training image by the pretrained model, with
    ``hard_negatives``: on other hardware, rounding could change them.
    """

    precision: str = ""
    optimizer: str = ""
    smallest_step: int = 0
    look_alikes: Any = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any] | None) -> "Choices":
        """Return the choices in a checkpoint; for a new run (None), nothing is chosen."""
        return cls(**(checkpoint or {}).get("choices", {}))


NEW_RUN = Choices()


@dataclass(frozen=True)
class Forecast:
    """What a run would take, measured on some of its own steps.

    Sizes are in bytes, times in seconds. ``unusable`` counts the training and validation pairs
    that are known to be skipped. The run makes ``validations`` passes over the validation pairs,
    each in ``validation_seconds``, and ``look_alike_searches``, each in ``look_alike_seconds``.
    ``cache_seconds`` and ``cache_bytes`` are for the features of frozen towers that are not in the
    cache yet. ``saves`` is how often the run writes a checkpoint, and ``disk_bytes`` the largest
    size of its output folder, which it has while one checkpoint replaces another.
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
    cache_seconds: float
    cache_bytes: int
    peak_bytes: int
    usable_bytes: int
    saves: int
    checkpoint_bytes: int
    best_bytes: int
    disk_bytes: int
    disk_free: int
    look_alike_searches: int = 0
    look_alike_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds for features, all steps that are left, and what is done between epochs, without
        early stopping."""
        steps = max(0, self.plan.total_steps - self.done_steps)
        validations = self.validations * self.validation_seconds
        searches = self.look_alike_searches * self.look_alike_seconds
        return self.cache_seconds + steps * self.seconds_per_step + validations + searches


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``step`` counts from 1 over the whole run, ``epoch`` from 1.

    ``loss`` is over the whole effective batch. ``seconds`` includes ``data_seconds``, the wait for
    the batch. ``applied`` is False if the gradient was not finite. ``skipped`` lists the pairs
    that could not be used. ``loss_floor`` is the lowest loss that any model could reach on these
    pairs. ``drift`` is the mean of 1 - cosine similarity to the pretrained embeddings that
    ``--preserve`` penalizes; it is not part of ``loss``.
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
    drift: float | None = None

    def metrics(self) -> dict[str, Any]:
        """Return the line for ``metrics.jsonl``."""
        omitted = {"skipped", "applied"} | (set() if self.loss_floor else {"loss_floor"})
        omitted |= {"drift"} if self.drift is None else set()
        values = {k: v for k, v in asdict(self).items() if k not in omitted}
        values["pairs_per_s"] = self.pairs / max(self.seconds, 1e-9)
        return {"kind": "step", **finite(values)}


@dataclass(frozen=True)
class EpochResult:
    """The validation after an epoch. Epoch 0 is the pretrained model, before any training.

    ``retrieval`` is what ``metrics.retrieval.Retrieval.to_dict`` returns. ``val_floor`` is the
    lowest ``val_loss`` that any model could reach. ``accuracy`` is that of a run that is trained on
    labels. ``look_alike_seconds`` is what finding the look-alikes of the epoch took, if it was done
    before the epoch.
    """

    epoch: int
    step: int
    train_loss: float | None
    val_loss: float
    retrieval: dict[str, Any]
    improved: bool = False
    val_floor: float = 0.0
    accuracy: float | None = None
    look_alike_seconds: float | None = None

    def recall(self) -> float:
        """Return the mean of R@1, R@5 and R@10 of both directions, in 0..1."""
        return mean_recall(self.retrieval)

    def metrics(self) -> dict[str, Any]:
        """Return the line for ``metrics.jsonl``."""
        omitted = set() if self.val_floor else {"val_floor"}
        optional = ("accuracy", "look_alike_seconds")
        omitted |= {name for name in optional if getattr(self, name) is None}
        values = {k: v for k, v in asdict(self).items() if k not in omitted}
        return {"kind": "epoch", **finite(values)}


class TrainingCallback:
    """Base class of everything that follows a run: progress displays, loggers, your own code.

    Override the methods you need; the others do nothing. Only the process of rank zero calls
    them, between steps, so a slow method slows down training. An exception ends the run.
    """

    def started(self, plan: Plan, done_steps: int) -> None:
        """Called before the first step; ``done_steps`` is above 0 if the run was resumed."""

    def stepped(self, result: StepResult) -> None:
        """Called after each optimizer step."""

    def epoch_ended(self, result: EpochResult) -> None:
        """Called after each validation, and once for the pretrained model (epoch 0)."""

    def closed(self) -> None:
        """Called last, however the run ended."""


@dataclass
class CallbackList(TrainingCallback):
    """Passes everything on to several callbacks, and closes them in reverse order."""

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


def ignore(*args: object) -> None:
    """Do nothing: the default of ``Callbacks.note`` and ``Callbacks.saved``."""


@dataclass(frozen=True)
class Callbacks:
    """The receivers of a run's reports. By default there are none.

    Attributes:
        callback: Follows the plan, the steps and the epochs.
        note: Receives sentences for the user, such as warnings.
        saved: Receives the path of each checkpoint and the number of optimizer steps done.
        progress: Shows the progress of work before and after training.
        observer: The former name of ``callback``, still accepted.
    """

    callback: TrainingCallback = TrainingCallback()  # noqa: RUF009 (it has no state)
    note: Note = ignore
    saved: Callable[[Path, int], None] = ignore
    progress: Progress = silent
    observer: InitVar[TrainingCallback | None] = None

    def __post_init__(self, observer: TrainingCallback | None) -> None:
        if observer is not None:
            object.__setattr__(self, "callback", observer)


@dataclass(frozen=True)
class RunRecords:
    """What a run left in its folder.

    ``settings`` has the section, name, value and default of each setting, and whether it was
    changed. ``run`` is what ``loggers.FileLogger`` writes. ``result`` and ``evaluation`` are None
    until the run has ended, ``interpolation`` and ``kept`` until ``clipft evaluate`` has made them.
    ``skipped`` has the first pairs that could not be used, ``skipped_counts`` the number of all
    such pairs by split. ``judgments`` are those of the best epoch, made in ``clipft browse``.
    """

    folder: str
    settings: list[dict[str, Any]]
    run: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    interpolation: dict[str, Any] | None
    kept: dict[str, Any] | None
    skipped: list[dict[str, Any]]
    skipped_counts: dict[str, int]
    judgments: Tally = field(default_factory=Tally)
