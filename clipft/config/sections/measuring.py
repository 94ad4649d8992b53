"""How models are measured, and where the figures are sent."""

from typing import Literal

from pydantic import field_validator

from clipft.config.fields import Section, names_in, setting
from clipft.core.errors import unknown_choice

TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
"""The names that ``track`` may have."""


class EvaluationSettings(Section):
    title = "Evaluation"
    label_field: str = setting(
        "category",
        "Metadata field with a pair's label, for metrics by label, for classification, and for "
        "training with --label-prompts, --shots and --positives label.",
        "fixed",
    )
    grade_field: str | None = setting(
        None,
        "Metadata field with a number that says how relevant an image is to its caption, 0 if it "
        "is not. Adds nDCG@10 by grades to the figures.",
    )
    resamples: int = setting(
        1000,
        "Bootstrap resamples for the 95% intervals. 0: no intervals.",
        unit="resamples",
        ge=0,
        le=100_000,
    )
    evaluation_memory: int = setting(
        256,
        "Memory for comparing all images with all texts, in addition to the embeddings, in MiB.",
        unit="MiB",
        ge=1,
    )

    evaluation_queries: int = setting(
        20_000,
        "Use the captions and images of at most this many pairs as queries, drawn by the seed. All "
        "pairs remain candidates. 0: use all as queries; the time then grows with the square of "
        "the number of pairs.",
        "fixed",
        unit="pairs",
        ge=0,
    )

    @property
    def evaluation_bytes(self) -> int:
        return self.evaluation_memory << 20


class TrackingSettings(Section):
    title = "Tracking"
    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled",
        "Logging to Weights & Biases: disabled, offline or online. metrics.jsonl is always "
        "written.",
    )
    wandb_project: str = setting("clip-furniture-finetune", "Weights & Biases project.")
    track: str = setting(
        "",
        "Trackers that also get the figures, separated by commas: wandb, tensorboard, mlflow, "
        "trackio. Here, wandb means --wandb online.",
        metavar="NAME,...",
    )
    track_project: str = setting(
        "clipft", "MLflow experiment or Trackio project to add the run to."
    )

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, value: str) -> str:
        for name in names_in(value):
            if name not in TRACKERS:
                raise ValueError(unknown_choice(name, TRACKERS))
        return value

    @property
    def tracker_names(self) -> list[str]:
        """The trackers that are on, each once."""
        also = ["wandb"] if self.wandb != "disabled" else []
        return list(dict.fromkeys(also + names_in(self.track)))
