"""``evaluate``: a checkpoint against the untouched model, on its own pairs and on general ones,
and between the two."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.settings import DataSettings, Settings
from clipft.core.errors import UsageError
from clipft.core.files import check_writable, write_json
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import Comparison, EvaluationSet
from clipft.evaluation.wise_ft import (
    Interpolation,
    Point,
    best_point,
    interpolation_of,
    parse_alphas,
    save_interpolated,
    sweep,
)
from clipft.metrics.ranking import Retrieval
from clipft.runs.folder import RunPaths
from clipft.runs.load import load_fine_tuned


@dataclass(frozen=True)
class Request:
    """What is wanted besides the comparison."""

    keep: Path | None
    alphas: list[float]
    save_at: float | None
    save_to: Path | None

    @classmethod
    def of(
        cls, keep: Path | None, interpolate: str | None, at: float | None, to: Path | None
    ) -> "Request":
        """
        Raises:
            UsageError, StorageError: what could not be done after hours of work.
        """
        if at is not None and not 0 <= at <= 1:
            raise UsageError(
                f"--save-interpolated {at:g}: not between 0 (untouched) and 1 (tuned)",
                "take a point of --interpolate 0:1:0.1",
            )
        if to:
            check_writable(to)
        return cls(keep, parse_alphas(interpolate) if interpolate else [], at, to)


@dataclass(frozen=True)
class Evaluated:
    """``figures`` are the tuned model's in short, as after each epoch."""

    figures: Retrieval
    comparison: Comparison
    keep_dir: Path | None
    keep: Comparison | None
    points: list[Point]

    @property
    def best_alpha(self) -> float:
        return best_point(self.points).alpha

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.figures.to_dict(),
            "evaluation": self.comparison.to_dict(),
            "keep": self.keep.to_dict() if self.keep else None,
            "interpolation": self._sweep() if self.points else None,
        }

    def _sweep(self) -> dict[str, Any]:
        points = [point.to_dict() for point in self.points]
        keep = str(self.keep_dir) if self.keep_dir else None
        return {"points": points, "best": self.best_alpha, "keep_dir": keep}

    def write(self, folder: Path, settings: Settings) -> None:
        """What was asked for besides the comparison, into a run folder.

        Raises:
            StorageError: the disk is full or refuses.
        """
        paths, on = RunPaths(folder), {"data_dir": str(settings.data_dir)}
        if self.keep:
            kept = {"keep_dir": str(self.keep_dir), **self.keep.to_dict()}
            write_json(paths.kept, kept, indent=2, ascii_only=False)
        if self.points:
            found = {**on, **self._sweep()}
            write_json(paths.interpolation, found, indent=2, ascii_only=False)


def evaluate_checkpoint(
    content: dict[str, Any], settings: Settings, request: Request, note: Callable[[str], None]
) -> Evaluated:
    """
    Raises:
        DataError, ModelError, UsageError: the pairs, the weights or the wish cannot be had.
    """
    tuned = load_fine_tuned(content, settings)
    inputs = tuned.base.inputs
    here = EvaluationSet.open(inputs, settings)
    there = EvaluationSet.open(inputs, _general(settings, request.keep)) if request.keep else None
    between = bool(request.alphas) or request.save_to is not None
    way = interpolation_of(content, settings) if between else None
    untouched, trained = load_model(settings, pretrained=True), settings.declared_scenario.trains
    ours, keep = here.evaluate(tuned), None
    before = here.evaluate(untouched).evaluation if trained else ours.evaluation
    compared = Comparison(before, ours.evaluation if trained else None)
    if there:
        old = there.evaluate(untouched).evaluation
        keep = Comparison(old, there.evaluate(tuned).evaluation if trained else None)
    points = _points(tuned, way, request, here, there, note) if way else []
    if way and request.save_to and request.save_at is not None:
        save_interpolated(request.save_to, content, way, request.save_at)
    short = ours.embedded.retrieval(settings.evaluation_bytes)
    return Evaluated(short, compared, request.keep, keep, points)


def _points(
    tuned: LoadedModel,
    way: Interpolation,
    request: Request,
    here: EvaluationSet,
    there: EvaluationSet | None,
    note: Callable[[str], None],
) -> list[Point]:
    points = []
    for point in sweep(tuned, way, request.alphas, here, there):
        points.append(point)
        note(f"alpha {point.alpha:g}: recall {point.here.recall():.1%}")
    return points


def _general(settings: Settings, folder: Path) -> Settings:
    """The same, but for a general set: its captions are its own, and no groups of products."""
    own = DataSettings.model_fields["caption"].default
    return settings.model_copy(update={"data_dir": folder, "caption": own, "group_field": None})
