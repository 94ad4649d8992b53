"""A linear classifier on frozen image features: what they hold, whatever the prompts say.

Logistic regression on unit features, its C chosen on a part of the training images, then
fitted on all of them (as CLIP's linear probe, Radford et al. 2021, section 3.2, with a coarser
grid).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.metrics.classification import Classification, classification

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
