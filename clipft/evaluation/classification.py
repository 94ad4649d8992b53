"""Zero-shot classification: a label is the mean embedding of its prompts.

Follows CLIP (Radford et al. 2021, section 3.1.4): each prompt's embedding has unit length,
the mean over the templates is brought to unit length again, the nearest label wins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Classification:
    """Shares in 0..1. ``top5`` is None with fewer than six labels: it would say nothing."""

    top1: float
    top5: float | None
    mean_per_class_recall: float
    images: int
    labels: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_per_class_recall": self.mean_per_class_recall,
            "images": self.images,
            "labels": self.labels,
        }


def label_embeddings(
    labels: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[list[str]], Tensor],
) -> Tensor:
    """One unit vector per label, float [labels, D]; ``encode`` gives unit rows."""
    rows = []
    for label in labels:
        prompts = encode([template.format(label) for template in templates])
        rows.append(functional.normalize(prompts.mean(0), dim=0))
    return torch.stack(rows)


def classify(images: Tensor, targets: Tensor, label_vectors: Tensor) -> Classification:
    """Figures for unit embeddings float [N, D] and the right label's number, int64 [N]."""
    scores = images @ label_vectors.T
    count = len(label_vectors)
    best = scores.topk(min(5, count), dim=1).indices
    right = best == targets[:, None]
    hits = right[:, 0].double()
    recalls = [hits[targets == label].mean() for label in torch.unique(targets)]
    return Classification(
        top1=hits.mean().item(),
        top5=right.any(1).double().mean().item() if count > 5 else None,
        mean_per_class_recall=torch.stack(recalls).mean().item(),
        images=len(images),
        labels=count,
    )
