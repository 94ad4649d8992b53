"""What a run knows between two steps; with its settings and data, what a checkpoint keeps."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipft.runs.folder import RunPaths
from clipft.runs.records import EpochResult
from clipft.training.loop import BadPairs, TrainState
from clipft.training.setup import RunSetup


@dataclass
class EarlyStopping:
    """Stops after ``patience`` epochs that do not improve by ``min_delta``.

    ``watches`` is the validation ``loss``, the mean ``recall``, or ``never``: then it only
    remembers the epoch of the lowest loss. Not-a-number counts as the worst value.
    """

    watches: str
    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    def update(self, result: EpochResult) -> bool:
        """Take one epoch in; True if it improved on the best so far."""
        value = -result.recall() if self.watches == "recall" else result.val_loss
        improved = value < self.best - self.min_delta  # False for not-a-number
        if improved:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return improved

    @property
    def due(self) -> bool:
        return self.watches != "never" and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


@dataclass
class RunState:
    """``training`` is None where nothing trains; ``validated``: the last epoch that ended is;
    ``finished``: nothing is left to train."""

    training: TrainState | None
    stopping: EarlyStopping
    bad: BadPairs
    before: EpochResult | None = None
    best: EpochResult | None = None
    validated: bool = True
    finished: bool = False

    @classmethod
    def of(cls, setup: RunSetup, skipped: Path) -> "RunState":
        """Before the first step. ``skipped``: where bad pairs are listed."""
        settings = setup.settings
        training = None
        if setup.plan.epochs:
            training = TrainState(
                setup.loaded.model, setup.make_optimiser(), setup.epoch_plan.steps
            )
        return cls(
            training,
            EarlyStopping(settings.stop_on, settings.patience, settings.min_delta),
            BadPairs(skipped, len(setup.train), settings, setup.processes),
        )

    @property
    def step(self) -> int:
        return self.training.step if self.training else 0

    def progress(self) -> dict[str, Any]:
        """For a checkpoint, beside the weights; JSON's types alone."""
        assert self.before
        return {
            "early_stopping": self.stopping.state_dict(),
            "before": asdict(self.before),
            "best": asdict(self.best) if self.best else None,
            "skipped_pairs": self.bad.count,
            "validated": self.validated,
            "finished": self.finished,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Weights and progress; but what is finished may be taken further."""
        if self.training:
            self.training.load_state_dict(checkpoint)
        self.stopping.load_state_dict(checkpoint["early_stopping"])
        self.before = EpochResult(**checkpoint["before"])
        self.best = EpochResult(**checkpoint["best"]) if checkpoint["best"] else None
        self.bad.count = checkpoint["skipped_pairs"]
        self.validated = checkpoint.get("validated", True)


@dataclass(frozen=True)
class TrainResult:
    """Figures of the untouched model and of the best epoch (None: none improved)."""

    before: EpochResult
    best: EpochResult | None
    steps: int
    stopped_early: bool
    skipped_pairs: int
    folder: Path
    checkpoint: Path

    def to_dict(self) -> dict[str, Any]:
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
        """That of a run which has trained to its end."""
        assert state.before
        return cls(
            before=state.before,
            best=state.best,
            steps=state.step,
            stopped_early=state.stopping.due,
            skipped_pairs=state.bad.count,
            folder=paths.folder,
            checkpoint=paths.checkpoint,
        )

    @classmethod
    def of_finished(cls, checkpoint: dict[str, Any], paths: RunPaths) -> "TrainResult":
        """That of a run whose checkpoint says that it has ended."""
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
