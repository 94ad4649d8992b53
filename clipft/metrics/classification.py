"""Zero-shot and linear classification of image embeddings.

Zero-shot follows CLIP (Radford et al. 2021, section 3.1.4): each prompt's embedding is brought to
unit length, the mean over the templates is brought to unit length again, and the nearest label
wins.
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
from clipft.metrics.definitions import Floats, Integers, PerQuery
from clipft.metrics.ranking import score_blocks

CLASSIFICATION = {
    "top1": "share of images whose best label is the right one (acc1 of CLIP_benchmark)",
    "top5": "share of images whose right label is among the best 5 (acc5); not given with 5 or "
    "fewer labels",
    "mean_per_class_recall": "top-1 of each label's images, mean over the labels that have any "
    "(scikit-learn's balanced accuracy)",
}
_BLOCK = 1 << 16
"""Images scored at a time."""
_NO_LABEL = -1
_MOST_CONFUSED = 10


@dataclass(frozen=True)
class Classification:
    """How N images were classified among L labels.

    ``right``, bool [N, up to 5], marks the place of the right label among the five best.
    ``confusion``, int64 [L, L], counts the images of a row's label that were given a column's;
    an image whose embedding is not a number is given none.
    ``recalls``, float64 [L], is NaN for labels without images. ``top5`` is None with fewer than
    six labels, where it would say nothing.
    """

    names: tuple[str, ...]
    right: "np.ndarray[Any, np.dtype[np.bool_]]"
    confusion: Integers
    recalls: Floats
    top1: float
    top5: float | None
    mean_per_class_recall: float

    def to_dict(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Return JSON values, with a bootstrap interval of top-1 over images if asked for."""
        around = {}
        if resamples:
            hits = PerQuery({"top1": self.right[:, 0].astype(float)}, np.arange(len(self.right)))
            around = {"top1_interval": interval(resampled([hits], resamples, seed)[0]["top1"])}
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        totals = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
        most_confused = (divmod(int(at), len(self.names)) for at in order)
        return {
            "top1": self.top1,
            **around,
            "top5": self.top5,
            "mean_per_class_recall": self.mean_per_class_recall,
            "images": len(self.right),
            "labels": len(self.names),
            "names": list(self.names),
            "recall": [None if np.isnan(recall) else float(recall) for recall in self.recalls],
            "confusion": self.confusion.tolist(),
            "confused": [
                {
                    "label": self.names[label],
                    "taken_for": self.names[taken],
                    "images": int(wrong[label, taken]),
                    "share": float(wrong[label, taken] / totals[label]),  # of the label's images
                }
                for label, taken in most_confused
                if wrong[label, taken]
            ],
        }


def label_embeddings(
    labels: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[list[str]], Tensor],
) -> Tensor:
    """Embed each label as the mean of its prompts.

    Args:
        labels: L names, which replace ``{}`` in each template.
        templates: prompts with ``{}`` in them.
        encode: embeds texts as float [texts, D] of unit length.

    Returns:
        float [L, D] of unit length.
    """
    rows = []
    for label in labels:
        prompts = encode([template.replace("{}", label) for template in templates])
        rows.append(functional.normalize(prompts.mean(0), dim=0))
    return torch.stack(rows)


def classify(
    images: Tensor, targets: Tensor, label_vectors: Tensor, names: Sequence[str]
) -> Classification:
    """Give each image the label with the nearest vector; embeddings with NaN get no label.

    Args:
        images: float [N, D] of unit length.
        targets: int64 [N], the number of the right label.
        label_vectors: float [L, D] of unit length, on the device of ``images``.
        names: the L labels.
    """
    best = []
    for _, _, scores in score_blocks(images, label_vectors, _BLOCK):
        # Stable, so that equal scores take the lower number first
        numbers = scores.nan_to_num(nan=-torch.inf)
        order = numbers.argsort(dim=1, descending=True, stable=True)[:, :5]
        known = ~scores.gather(1, order).isnan()
        best.append(order.where(known, _NO_LABEL).cpu())
    return classification(torch.cat(best), targets, names)


def classification(best: Tensor, targets: Tensor, names: Sequence[str]) -> Classification:
    """Compute the figures of a classifier.

    Args:
        best: int64 [N, up to 5], the labels it ranks first, the best one first; -1 for none.
        targets: int64 [N], the number of the right label.
        names: the L labels.
    """
    confusion = np.zeros((len(names), len(names)), np.int64)
    given = best[:, 0] != _NO_LABEL
    np.add.at(confusion, (targets[given].numpy(), best[given, 0].numpy()), 1)
    right = (best == targets[:, None]).numpy()
    totals = np.bincount(targets.numpy(), minlength=len(names))
    with np.errstate(invalid="ignore"):  # 0 / 0 for labels without images
        recalls: Floats = np.diag(confusion) / totals
    return Classification(
        names=tuple(names),
        right=right,
        confusion=confusion,
        recalls=recalls,
        top1=float(right[:, 0].mean()),
        top5=float(right.any(1).mean()) if len(names) > 5 else None,
        mean_per_class_recall=float(np.nanmean(recalls)),
    )


_STRENGTHS = tuple(10.0**power for power in range(-2, 6))
"""Values of C to choose from, the most regularized first."""
_HELD_OUT = 0.2
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Linear:
    """A linear classifier's figures on other images than it was trained on.

    ``c`` is scikit-learn's C, the inverse strength of the regularization.
    """

    figures: Classification
    c: float
    training_images: int

    def to_dict(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Return JSON values, with an interval as in ``Classification.to_dict``."""
        figures = self.figures.to_dict(resamples, seed)
        return {**figures, "c": self.c, "training_images": self.training_images}


@dataclass(frozen=True)
class Labelled:
    """Unit features, float32 [N, D], and the numbers of their labels, int64 [N]."""

    features: Tensor
    targets: Tensor


def linear_classifier(
    train: Labelled, test: Labelled, names: Sequence[str], seed: int
) -> Linear | None:
    """Fit logistic regression to ``train`` and measure it on ``test``.

    As in CLIP's linear probe, C is chosen by accuracy on a held-out part: a fifth of each
    label's training images, at least one of a label that has two. The final fit uses them all.

    Returns:
        None if the training images have fewer than two labels.
    """
    x, y = train.features.numpy(), train.targets.numpy()
    if len(np.unique(y)) < 2:
        return None
    out = held_out(y, seed)
    kept, c = ~out, _STRENGTHS[len(_STRENGTHS) // 2]
    if out.any() and len(np.unique(y[kept])) > 1:
        # Each fit starts from the one before it, which takes less than half the time
        path, accuracy = _regression(warm_start=True), dict[float, float]()
        for strength in _STRENGTHS:
            predicted = _fit(path, x[kept], y[kept], strength).predict(x[out])
            accuracy[strength] = float((predicted == y[out]).mean())
        c = max(_STRENGTHS, key=accuracy.__getitem__)  # of equals the most regularized
    fitted = _fit(_regression(), x, y, c)
    # Labels that were not trained on score below every probability
    scores = np.full((len(test.features), len(names)), -1.0)
    scores[:, fitted.classes_] = fitted.predict_proba(test.features.numpy())
    best = torch.from_numpy(np.argsort(-scores, axis=1, kind="stable")[:, :5].copy())
    return Linear(classification(best, test.targets, names), c, len(y))


def held_out(targets: Integers, seed: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Draw a fifth of each label's images, at least one of a label that has two: bool [N]."""
    random, out = np.random.default_rng(seed), np.zeros(len(targets), bool)
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        if len(members) > 1:
            out[members[: max(1, round(_HELD_OUT * len(members)))]] = True
    return out


def _regression(warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=warm_start)


def _fit(regression: Any, features: Any, targets: Any, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # A weakly regularized C may not converge; the held-out accuracy then decides against it
        warnings.simplefilter("ignore", ConvergenceWarning)
        return regression.set_params(C=c).fit(features, targets)
