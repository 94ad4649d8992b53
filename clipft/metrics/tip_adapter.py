"""Classification by prompts and by cached features of training images, without any training.

Tip-Adapter (Zhang et al. 2022, arXiv:2207.09519): the similarity to each training image is
sharpened by an exponential and added to the prompts' logit for the label of that image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clipft.metrics.classification import Classification, Labelled, classification, held_out

_SHARES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Values of alpha, the weight of the training images beside the prompts."""
_SHARPNESS = (1.0, 3.0, 5.5, 8.0, 12.0)
"""Values of beta."""
_ROWS = 1 << 12
"""Images scored at a time."""


def tip_adapter(
    train: Labelled,
    test: Labelled,
    label_vectors: Tensor,
    scale: float,
    names: Sequence[str],
    seed: int,
) -> Classification:
    """Classify ``test`` by the prompts and by the features of ``train``.

    Alpha and beta are chosen by accuracy on a held-out part of the training images, as for the
    linear classifier; the final one has all of them.

    Args:
        train: features and labels of the training images.
        test: those of other images.
        label_vectors: float32 [L, D] of unit length.
        scale: the factor of the model's logits.
        names: the L labels.
        seed: draws the held-out part.
    """
    out = torch.from_numpy(held_out(train.targets.numpy(), seed))
    alpha, beta = 1.0, 5.5  # those of the paper, if there is nothing to choose them on
    if out.any() and not out.all():
        kept, others = (Labelled(train.features[m], train.targets[m]) for m in (~out, out))
        accuracy = {
            (a, b): _accuracy(_scores(kept, others.features, label_vectors, scale, a, b), others)
            for a in _SHARES
            for b in _SHARPNESS
        }
        alpha, beta = max(accuracy, key=accuracy.__getitem__)
    scores = _scores(train, test.features, label_vectors, scale, alpha, beta)
    best = torch.from_numpy(np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :5].copy())
    return classification(best, test.targets, names)


def _scores(
    train: Labelled, images: Tensor, label_vectors: Tensor, scale: float, alpha: float, beta: float
) -> Tensor:
    """Score each label for each image: float32 [N, L]."""
    labels = torch.zeros(len(train.targets), len(label_vectors))
    labels[torch.arange(len(labels)), train.targets] = 1
    parts = [
        scale * rows @ label_vectors.T
        + alpha * (-beta * (1 - rows @ train.features.T)).exp() @ labels
        for rows in torch.split(images, _ROWS)
    ]
    return torch.cat(parts)


def _accuracy(scores: Tensor, test: Labelled) -> float:
    return float((scores.argmax(1) == test.targets).double().mean())
