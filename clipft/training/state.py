"""What a run knows between two steps; with its settings and data, what a checkpoint keeps."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipft.runs.records import EpochResult
from clipft.training.bad_pairs import BadPairs
from clipft.training.early_stopping import EarlyStopping
from clipft.training.setup import RunSetup
from clipft.training.loop import TrainState


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
