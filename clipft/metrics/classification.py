"""Zero-shot classification: a label is the mean embedding of its prompts.

Follows CLIP (Radford et al. 2021, section 3.1.4): each prompt's embedding has unit length,
the mean over the templates is brought to unit length again, the nearest label wins.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipft.metrics.bootstrap import interval, resampled
from clipft.metrics.definitions import Integers, PerQuery

CLASSIFICATION = {
    "top1": "share of images whose best label is the right one (acc1 of CLIP_benchmark)",
    "top5": "share of images whose right label is among the best 5 (acc5); not with 5 or fewer",
    "mean_per_class_recall": "top-1 of each label's images, mean over the labels that have any "
    "(scikit-learn's balanced accuracy)",
}
_BLOCK = 1 << 16
_MOST_CONFUSED = 10


@dataclass(frozen=True)
class Classification:
    """``right`` are hits of each image, bool [N, 5]: place of the right label. ``confusion``
    int64 [L, L]: images of a row's label that were taken for a column's."""

    names: tuple[str, ...]
    right: "np.ndarray[Any, np.dtype[np.bool_]]"
    confusion: Integers

    @property
    def top1(self) -> float:
        return float(self.right[:, 0].mean())

    @property
    def top5(self) -> float | None:
        """None with fewer than six labels: it would say nothing."""
        return float(self.right.any(1).mean()) if len(self.names) > 5 else None

    @property
    def mean_per_class_recall(self) -> float:
        """Over the labels that have images."""
        return float(np.nanmean(self._recalls()))

    def confused(self) -> list[dict[str, Any]]:
        """The pairs of labels that are mixed up most: ``share`` of the label's images."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        totals = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
        pairs = (divmod(int(at), len(self.names)) for at in order)
        return [
            {
                "label": self.names[label],
                "taken_for": self.names[taken],
                "images": int(wrong[label, taken]),
                "share": float(wrong[label, taken] / totals[label]),
            }
            for label, taken in pairs
            if wrong[label, taken]
        ]

    def to_dict(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Top-1 with its interval over images; ``recall`` of a label without images: None."""
        around = {}
        if resamples:
            hits = PerQuery({"top1": self.right[:, 0].astype(float)}, np.arange(len(self.right)))
            around = {"top1_interval": interval(resampled([hits], resamples, seed)[0]["top1"])}
        recalls = [None if np.isnan(recall) else float(recall) for recall in self._recalls()]
        return {
            "top1": self.top1,
            **around,
            "top5": self.top5,
            "mean_per_class_recall": self.mean_per_class_recall,
            "images": len(self.right),
            "labels": len(self.names),
            "names": list(self.names),
            "recall": recalls,
            "confusion": self.confusion.tolist(),
            "confused": self.confused(),
        }

    def _recalls(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        with np.errstate(invalid="ignore"):
            recalls: np.ndarray[Any, np.dtype[np.float64]]
            recalls = np.diag(self.confusion) / self.confusion.sum(1)
            return recalls


def label_embeddings(
    labels: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[list[str]], Tensor],
) -> Tensor:
    """One unit vector per label, float [labels, D]; ``encode`` gives unit rows."""
    rows = []
    for label in labels:
        prompts = encode([template.replace("{}", label) for template in templates])
        rows.append(functional.normalize(prompts.mean(0), dim=0))
    return torch.stack(rows)


def classify(
    images: Tensor, targets: Tensor, label_vectors: Tensor, names: Sequence[str]
) -> Classification:
    """Figures for unit embeddings float [N, D] and the right label's number, int64 [N]."""
    blocks = range(0, len(images), _BLOCK)
    scores = (images[start : start + _BLOCK] @ label_vectors.T for start in blocks)
    best = torch.cat([_best(block) for block in scores])
    return classification(best, targets, names)


def classification(best: Tensor, targets: Tensor, names: Sequence[str]) -> Classification:
    """Of the labels that a classifier put first, int64 [N, up to 5], the best one first."""
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (targets.numpy(), best[:, 0].numpy()), 1)
    return Classification(tuple(names), (best == targets[:, None]).numpy(), confusion)


def _best(scores: Tensor) -> Tensor:
    """The five best labels of each image; equal scores: the lower number first."""
    order = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return order[:, :5].cpu()


_GRID = tuple(10.0**power for power in range(-2, 6))
_HELD_OUT = 0.2
_STEPS = 1000


@dataclass(frozen=True)
class Linear:
    """Figures on other images; ``c`` is the inverse strength of the regularisation."""

    figures: Classification
    c: float
    training_images: int

    def to_dict(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        figures = self.figures.to_dict(resamples, seed)
        return {**figures, "c": self.c, "training_images": self.training_images}


@dataclass(frozen=True)
class Labelled:
    """Unit features float32 [N, D] and numbers of their labels, int64 [N]."""

    features: Tensor
    targets: Tensor


def linear_classifier(
    train: Labelled, test: Labelled, names: Sequence[str], seed: int
) -> Linear | None:
    """None where the training images have fewer than two labels."""
    x, y = train.features.numpy(), train.targets.numpy()
    if len(np.unique(y)) < 2:
        return None
    held_out = _held_out(y, seed)
    c = _GRID[len(_GRID) // 2]
    if held_out.any() and len(np.unique(y[~held_out])) > 1:
        kept = ~held_out
        # The least C among equals: the most regular
        c = max(_GRID, key=lambda c: _accuracy(_fit(x[kept], y[kept], c), x[held_out], y[held_out]))
    fitted = _fit(x, y, c)
    scores = np.full((len(test.features), len(names)), -1.0)  # of labels that were not learnt
    scores[:, fitted.classes_] = fitted.predict_proba(test.features.numpy())
    best = torch.from_numpy(np.argsort(-scores, axis=1, kind="stable")[:, :5].copy())
    return Linear(classification(best, test.targets, names), c, len(y))


def _held_out(targets: "np.ndarray[Any, Any]", seed: int) -> "np.ndarray[Any, Any]":
    """A fifth of each label's images, at least one where there are two: bool [N]."""
    random, chosen = np.random.default_rng(seed), np.zeros(len(targets), bool)
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        if len(members) > 1:
            chosen[members[: max(1, round(_HELD_OUT * len(members)))]] = True
    return chosen


def _fit(features: Any, targets: Any, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a C that will not be chosen
        return LogisticRegression(C=c, max_iter=_STEPS).fit(features, targets)


def _accuracy(fitted: Any, features: Any, targets: Any) -> float:
    return float((fitted.predict(features) == targets).mean())


TEMPLATES: dict[str, tuple[str, ...]] = {
    "general": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a good photo of a {}.",
        "a close-up photo of a {}.",
        "a bright photo of a {}.",
        "a picture of a {}.",
        "itap of a {}.",
    ),
    "furniture": (
        "a photo of a {}.",
        "a product photo of a {}.",
        "a {} on a white background.",
        "a {} in a room.",
        "a {}, furniture.",
        "a catalogue picture of a {}.",
        "{}",
    ),
}
