"""The way from the untouched to the tuned weights: what is gained here, what is lost there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.errors import ModelError, UsageError
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import EvaluationSet
from clipft.metrics.figures import DIRECTIONS
from clipft.metrics.retrieval import Evaluation, recall_difference
from clipft.runs.checkpoint import save_checkpoint

_LORA_OUT = ("lora_B", "lora_embedding_B")
_LORA_IN = ("lora_A", "lora_embedding_A")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Interpolation:
    """Two ``TrainableModel.trainable_state`` of one scenario, on the CPU.

    Raises:
        ModelError: nothing was trained, or the two are not of one scenario, or the untouched
            adapters already change the model, so that no scale of the tuned ones undoes it.
    """

    untouched: State
    tuned: State

    def __post_init__(self) -> None:
        if not self.tuned:
            raise ModelError("nothing was trained: there is nothing to interpolate", _HINT)
        if self.untouched.keys() != self.tuned.keys():
            raise ModelError("the weights are not those of the model's scenario", _HINT)
        changing = [name for name, w in self.untouched.items() if _is(name, _LORA_OUT) and w.any()]
        if changing:
            raise ModelError(
                f"the adapters change the model before training ({changing[0]} is not 0): "
                "their scale does not lead back to the untouched model",
                _HINT,
            )

    def at(self, alpha: float) -> State:
        """For ``TrainableModel.load_trainable_state``; exact at both ends."""
        return {name: self._weight(name, alpha) for name in self.tuned}

    def _weight(self, name: str, alpha: float) -> Tensor:
        start, end = self.untouched[name], self.tuned[name]
        if _is(name, _LORA_IN):
            return end
        return torch.lerp(start.float(), end.float(), alpha).to(end.dtype)


_HINT = "name a run that trained something"


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    return any(part in kinds for part in name.split("."))


_MOST_POINTS = 101


@dataclass(frozen=True)
class Point:
    """``gain`` on the tuned-for pairs and ``kept`` on the general ones are differences to the
    untouched model in mean recall: value, low, high, clear."""

    alpha: float
    here: Evaluation
    gain: dict[str, Any]
    there: Evaluation | None
    kept: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "recall": self.here.recall(),
            "gain": self.gain,
            **_paired(self.here),
            "keep": {"recall": self.there.recall(), "change": self.kept, **_paired(self.there)}
            if self.there
            else None,
        }

    @property
    def keeps(self) -> bool:
        """No clear loss on the general pairs."""
        return not self.kept or not self.kept.get("clear") or self.kept["value"] > 0


def _paired(evaluation: Evaluation) -> dict[str, Any]:
    return {d: dict(evaluation.parts["paired"][d].means) for d in DIRECTIONS}


def sweep(
    loaded: LoadedModel,
    way: Interpolation,
    alphas: Sequence[float],
    here: EvaluationSet,
    there: EvaluationSet | None,
) -> Iterator[Point]:
    """One pass over the pairs for each alpha; the model is left at the tuned weights."""
    sets = [here] if there is None else [here, there]
    loaded.model.load_trainable_state(way.at(0))
    untouched = [pairs.evaluate(loaded).evaluation for pairs in sets]
    for alpha in alphas:
        found = untouched
        if alpha:
            loaded.model.load_trainable_state(way.at(alpha))
            found = [pairs.evaluate(loaded).evaluation for pairs in sets]
        changes = [recall_difference(a, b) for a, b in zip(found, untouched, strict=True)]
        yield Point(
            alpha,
            found[0],
            changes[0],
            found[1] if there else None,
            changes[1] if there else None,
        )
    loaded.model.load_trainable_state(way.at(1))


def best_point(points: Sequence[Point]) -> Point:
    """The most recall among those without a clear loss on the general pairs; the untouched
    model is always one of those, if it is among the points."""
    return max([p for p in points if p.keeps] or points, key=lambda point: point.here.recall())


def parse_alphas(text: str) -> list[float]:
    """``START:STOP:STEP`` (both ends included) or values with commas, each in 0..1.

    Raises:
        UsageError: it is neither.
    """
    try:
        parts = [float(part) for part in text.replace(":", ",").split(",")]
        alphas = _stepped(*parts) if ":" in text else parts
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise _wrong(text) from error
    inside = all(0 <= alpha <= 1 for alpha in alphas)
    if not inside or not 0 < len(alphas) <= _MOST_POINTS:
        raise _wrong(text)
    return alphas


def _stepped(start: float, stop: float, step: float) -> list[float]:
    if step <= 0 or (stop - start) / step > _MOST_POINTS:
        raise ValueError
    whole = int((stop - start) / step + 1e-9)
    return [round(start + step * number, 10) for number in range(whole + 1)]


def _wrong(text: str) -> UsageError:
    return UsageError(
        f"--interpolate {text}: not points between 0 (untouched) and 1 (tuned)",
        f"write 0:1:0.1 or 0,0.5,1, at most {_MOST_POINTS} points",
    )


def interpolation_of(content: dict[str, Any], settings: Settings) -> Interpolation:
    """The way from the untouched weights to those of a checkpoint.

    Raises:
        ModelError: nothing was trained, or not so that there is a way back.
    """
    untouched = load_model(settings).model.trainable_state()
    return Interpolation(untouched, content["model_state_dict"])


def save_interpolated(path: Path, content: dict[str, Any], way: Interpolation, at: float) -> None:
    """A checkpoint of weights alone, as ``best.pt`` is, at a point of the way.

    Raises:
        StorageError: the disk is full or refuses.
    """
    kept = {key: value for key, value in content.items() if key not in _OF_TRAINING}
    # The best epoch's figures are not those of these weights, and there is nothing to go on with
    own = {"model_state_dict": way.at(at), "interpolated_at": at, "best": None, "finished": True}
    save_checkpoint(path, {**kept, **own})


_OF_TRAINING = frozenset(
    {"optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "skipped_in_a_row"}
)
