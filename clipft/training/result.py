"""What a run came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.runs.records import EpochResult
from clipft.runs.folder import RunPaths
from clipft.training.state import RunState


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
