"""Compares a checkpoint with its pretrained model, as ``clipft evaluate`` does.

Both are measured on the checkpoint's own pairs and, if requested, on a general data set. Models
with weights between the two can be measured too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipft.config.settings import Settings
from clipft.core.files import write_json
from clipft.data.shards.names import tars_in
from clipft.embedding.load import load_model
from clipft.evaluation.evaluator import Comparison, EvaluationSet, compare
from clipft.evaluation.frontier import RunPoint, measure_runs
from clipft.evaluation.request import Request, general_settings
from clipft.evaluation.wise_ft import (
    Interpolation,
    Point,
    best_point,
    save_interpolated,
    sweep,
)
from clipft.metrics.ranking import Retrieval
from clipft.models.pretrained import ModelInputs
from clipft.runs.folder import RunPaths
from clipft.runs.load import load_fine_tuned


@dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation.

    ``split`` names the pairs that were used, "test" or "val". ``figures`` are those of the
    fine-tuned model in the short form, as after each epoch. ``keep`` compares the models on the
    general data set in ``keep_dir``. ``points`` and ``runs`` are empty unless requested.
    """

    split: str
    figures: Retrieval
    comparison: Comparison
    keep_dir: Path | None
    keep: Comparison | None
    points: list[Point]
    runs: list[RunPoint] = field(default_factory=list)

    @property
    def best_alpha(self) -> float:
        return best_point(self.points).alpha

    def to_dict(self) -> dict[str, Any]:
        """Return the part of ``clipft evaluate --json`` that was measured."""
        return {
            **self.figures.to_dict(),
            "split": self.split,
            "evaluation": self.comparison.to_dict(),
            "keep": self.keep.to_dict() if self.keep else None,
            "interpolation": self._interpolation() if self.points else None,
        }

    def _interpolation(self) -> dict[str, Any]:
        points = [point.to_dict() for point in self.points]
        keep_dir = str(self.keep_dir) if self.keep_dir else None
        found = {"points": points, "best": self.best_alpha, "keep_dir": keep_dir}
        return found | ({"runs": [run.to_dict() for run in self.runs]} if self.runs else {})

    def write(self, folder: Path, settings: Settings) -> None:
        """Write kept.json and interpolation.json into a run folder, if they were requested.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        paths = RunPaths(folder)
        if self.keep:
            retention = {"keep_dir": str(self.keep_dir), **self.keep.to_dict()}
            write_json(paths.kept, retention, indent=2, ascii_only=False)
        if self.points:
            found = {"data_dir": str(settings.data_dir), **self._interpolation()}
            write_json(paths.interpolation, found, indent=2, ascii_only=False)


def evaluate_checkpoint(
    content: dict[str, Any], settings: Settings, request: Request, note: Callable[[str], None]
) -> Evaluated:
    """Evaluate a checkpoint and its pretrained model.

    Args:
        content: the content of the checkpoint.
        settings: its settings, with those of the evaluation.
        request: what to measure besides.
        note: receives sentences for the user.

    Raises:
        DataError: there are no validation pairs, or they cannot be read.
        ModelError: the checkpoint does not fit its pretrained model, or has nothing to
            interpolate.
        UsageError: the settings do not fit the pairs.
    """
    fine_tuned = load_fine_tuned(content, settings)
    inputs = fine_tuned.base.inputs
    # Open everything that may be refused before the first pair is embedded
    own = EvaluationSet.open(inputs, settings, request.split)
    by = f", with {own.caption} as captions" if settings.fields else ""
    note(f"Evaluating on the {own.title.lower()} pairs of {settings.data_dir}{by}.")
    general = None
    if request.keep:
        general = EvaluationSet.open(inputs, general_settings(settings, request.keep))
    # Alpha is chosen by the results at the alphas, so these must not be measured on test pairs
    along, general_along = own, general
    if request.alphas:
        along = _for_choosing(own, inputs)
        general_along = _for_choosing(general, inputs) if general else None
    path = None
    if request.alphas or request.save_to:
        # The model of this scenario before its first step; the seed gives the same adapters again
        start = load_model(settings).model.trainable_state()
        path = Interpolation(start, content["model_state_dict"])

    pretrained = load_model(settings, pretrained=True)
    after = fine_tuned if settings.declared_scenario.trains else None
    comparison = compare(own, pretrained, after)
    retention = compare(general, pretrained, after) if general else None
    points, runs = [], list[RunPoint]()
    if path:
        for point in sweep(fine_tuned, path, request.alphas, along, general_along):
            points.append(point)
            note(f"alpha {point.alpha:g}: recall {point.own.recall():.1%}")
        if request.save_to and request.save_at is not None:
            save_interpolated(request.save_to, content, path, request.save_at)
    if request.frontier and general_along:
        sets = (along, general_along)
        for run in measure_runs(request.frontier, pretrained, settings, sets, points):
            runs.append(run)
            note(f"{run.name}: recall {run.point.own.recall():.1%}")
    short = (comparison.after or comparison.before).retrieval
    return Evaluated(own.split, short, comparison, request.keep, retention, points, runs)


def _for_choosing(pairs: EvaluationSet, inputs: ModelInputs) -> EvaluationSet:
    """Return the validation pairs of the same data set, or ``pairs`` if it has none."""
    if pairs.split == "val" or not tars_in(pairs.settings.data_dir / "val"):
        return pairs
    return EvaluationSet.open(inputs, pairs.settings, "val")
