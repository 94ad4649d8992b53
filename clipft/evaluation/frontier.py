"""Compares gain and retention of other runs with those of interpolated weights.

Training with ``--preserve`` and interpolation by WiSE-FT are two ways to gain on the own pairs and
lose less on general ones. Both are measured on the same pairs, so that they can be compared
resample by resample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.settings import EVALUATION_OVERRIDES, Settings
from clipft.config.sources import LoadedSettings
from clipft.core.errors import ModelError
from clipft.embedding.load import LoadedModel
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.wise_ft import Point
from clipft.metrics.retrieval import recall_difference
from clipft.runs.checkpoint import check_base_model, load_checkpoint
from clipft.runs.load import load_fine_tuned
from clipft.runs.places import find_checkpoint, saved_settings


@dataclass(frozen=True)
class RunPoint:
    """A run on the frontier. ``preserve`` is the weight of its penalty.

    ``dominates`` and ``dominated_by`` are points between the two models, by alpha.
    """

    run: Path
    preserve: float
    point: Point
    dominates: list[float]
    dominated_by: list[float]

    @property
    def name(self) -> str:
        return f"--preserve {self.preserve:g}" if self.preserve else str(self.run)

    def to_dict(self) -> dict[str, Any]:
        """Return one of the ``runs`` of interpolation.json."""
        measured = self.point.to_dict()
        del measured["alpha"]
        about = {"name": self.name, "run": str(self.run), "preserve": self.preserve}
        return {
            **about,
            **measured,
            "dominates": self.dominates,
            "dominated_by": self.dominated_by,
        }


def measure_runs(
    runs: Sequence[Path],
    pretrained: LoadedModel,
    settings: Settings,
    sets: tuple[EvaluationSet, EvaluationSet],
    points: Sequence[Point],
) -> Iterator[RunPoint]:
    """Evaluate runs on the own and the general pairs, and compare them with ``points``.

    Args:
        runs: checkpoints or run folders.
        pretrained: the pretrained model of all runs.
        settings: the settings of the evaluation.
        sets: the own and the general pairs.
        points: the result of ``wise_ft.sweep`` on the same pairs.

    Raises:
        ModelError: a checkpoint cannot be loaded, or began with another model.
    """
    before = [pairs.evaluate(pretrained).evaluation for pairs in sets]
    for run in runs:
        content = load_checkpoint(find_checkpoint(run, settings))
        check_base_model(content, pretrained.identity, ModelError)
        own = evaluation_settings(content, settings)
        loaded = load_fine_tuned(content, own)
        found = [pairs.evaluate(loaded).evaluation for pairs in sets]
        gain, retention = (recall_difference(a, b) for a, b in zip(found, before, strict=True))
        point = Point(1.0, found[0], gain, found[1], retention)
        better = [other.alpha for other in points if dominates(point, other)]
        worse = [other.alpha for other in points if dominates(other, point)]
        yield RunPoint(run, own.preserve, point, better, worse)


def evaluation_settings(content: dict[str, Any], settings: Settings) -> Settings:
    """Return the settings of a checkpoint, with the evaluation settings taken from ``settings``."""
    shared = (*EVALUATION_OVERRIDES, "model")
    now = LoadedSettings(settings, dict.fromkeys(Settings.model_fields, "command"))
    return saved_settings(content, now, shared)


def dominates(one: Point, other: Point) -> bool:
    """Return whether ``one`` is clearly better on one set, and clearly worse on none."""
    if not one.general or not other.general:
        return False
    changes = recall_difference(one.own, other.own), recall_difference(one.general, other.general)
    clear = [change["value"] for change in changes if change.get("clear")]
    return bool(clear) and min(clear) > 0
