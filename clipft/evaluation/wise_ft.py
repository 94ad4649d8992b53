"""WiSE-FT: weights between the pretrained and the fine-tuned model (Wortsman et al. 2022).

Alpha 0 gives the pretrained weights, and alpha 1 the fine-tuned ones. In between, a model often
keeps most of its gain on its own pairs and loses less on general ones. Full weights are
interpolated linearly. Only the output matrix of a LoRA adapter is scaled, so that alpha 0.5 gives
exactly half of its change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.core.errors import ModelError
from clipft.embedding.load import LoadedModel
from clipft.evaluation.evaluator import EvaluationSet
from clipft.metrics.figures import DIRECTIONS
from clipft.metrics.retrieval import Evaluation, recall_difference
from clipft.runs.checkpoint import save_checkpoint

_LORA_OUT = ("lora_B", "lora_embedding_B")
_LORA_IN = ("lora_A", "lora_embedding_A")
_HINT = "name a run that trained something"
TRAINING_KEYS = frozenset(
    {
        "optimizer_state_dict",
        "scheduler_state_dict",
        "scaler_state_dict",
        "skipped_in_a_row",
        "trained_state_dict",
    }
)
"""Keys of a checkpoint that are only needed to resume a run."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Interpolation:
    """The path between two states of ``TrainableModel.trainable_state``, on the CPU.

    Raises:
        ModelError: nothing was trained; the two belong to different scenarios; or the adapters
            already change the model before training (as PiSSA's do), so that no scale of the
            fine-tuned ones leads back to the pretrained model.
    """

    pretrained: State
    fine_tuned: State

    def __post_init__(self) -> None:
        if not self.fine_tuned:
            raise ModelError("nothing was trained: there is nothing to interpolate", _HINT)
        if self.pretrained.keys() != self.fine_tuned.keys():
            raise ModelError("the weights do not belong to the model's scenario", _HINT)
        for name, weight in self.pretrained.items():
            if _has_part(name, _LORA_OUT) and weight.any():
                raise ModelError(
                    f"the adapters change the model before training ({name} is not 0), so scaling "
                    "them does not lead back to the pretrained model",
                    _HINT,
                )

    def at(self, alpha: float) -> State:
        """Return weights for ``TrainableModel.load_trainable_state``; exact at both ends."""
        state = {}
        for name, end in self.fine_tuned.items():
            if _has_part(name, _LORA_IN):
                state[name] = end  # scaling both matrices would scale their product twice
            else:
                start = self.pretrained[name].float()
                state[name] = torch.lerp(start, end.float(), alpha).to(end.dtype)
        return state


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in parts for part in name.split("."))


@dataclass(frozen=True)
class Point:
    """The results of the weights at ``alpha`` on the checkpoint's own and on general pairs.

    ``gain`` and ``retention`` are the differences in mean recall to the pretrained model, on the
    own and on the general pairs, as JSON with ``value``, ``low``, ``high`` and ``clear``.
    """

    alpha: float
    own: Evaluation
    gain: dict[str, Any]
    general: Evaluation | None = None
    retention: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a point of interpolation.json."""

        def paired(evaluation: Evaluation) -> dict[str, Any]:
            return {d: dict(evaluation.parts["paired"][d].means) for d in DIRECTIONS}

        keep = None
        if self.general:
            recall = self.general.recall()
            keep = {"recall": recall, "change": self.retention, **paired(self.general)}
        return {
            "alpha": self.alpha,
            "recall": self.own.recall(),
            "gain": self.gain,
            **paired(self.own),
            "keep": keep,
        }


def sweep(
    loaded: LoadedModel,
    path: Interpolation,
    alphas: Sequence[float],
    own: EvaluationSet,
    general: EvaluationSet | None,
) -> Iterator[Point]:
    """Evaluate a model at each alpha. Afterwards it has the fine-tuned weights again.

    Each alpha costs one pass over all pairs, and the pretrained weights another one.
    """
    sets = [own, general] if general else [own]
    loaded.model.load_trainable_state(path.at(0))
    pretrained = [pairs.evaluate(loaded).evaluation for pairs in sets]
    for alpha in alphas:
        found = pretrained
        if alpha:
            loaded.model.load_trainable_state(path.at(alpha))
            found = [pairs.evaluate(loaded).evaluation for pairs in sets]
        changes = [recall_difference(a, b) for a, b in zip(found, pretrained, strict=True)]
        if general:
            yield Point(alpha, found[0], changes[0], found[1], changes[1])
        else:
            yield Point(alpha, found[0], changes[0])
    loaded.model.load_trainable_state(path.at(1))


def best_point(points: Sequence[Point]) -> Point:
    """Return the point with the highest recall among those without a clear loss on general pairs.

    Alpha 0 never has such a loss. If all points have one, the best of all points is returned.
    """

    def retains(point: Point) -> bool:
        change = point.retention
        return not change or not change.get("clear") or change["value"] > 0

    return max([p for p in points if retains(p)] or points, key=lambda point: point.own.recall())


def save_interpolated(
    file: Path, content: dict[str, Any], path: Interpolation, alpha: float
) -> None:
    """Write the weights at ``alpha`` as a checkpoint without training state, like ``best.pt``.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    copied = {key: value for key, value in content.items() if key not in TRAINING_KEYS}
    changed = {
        "model_state_dict": path.at(alpha),
        "interpolated_at": alpha,
        "best": None,  # the best epoch had other weights, so its figures do not apply
        "finished": True,  # there is nothing to resume
    }
    save_checkpoint(file, {**copied, **changed})
