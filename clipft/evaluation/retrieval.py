"""What is looked at after every epoch: paired retrieval in short, and the validation loss.

Row i of the images belongs to row i of the texts; ``metrics.PAIRED`` defines the figures.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clipft.metrics.ranking import ranks_of

_BYTES = 12
"""Of a logit in flight: itself, its shift and its logarithm."""


@dataclass(frozen=True)
class Direction:
    """Figures of one direction; recalls and MRR in 0..1, the median rank from 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mrr: float

    def to_dict(self) -> dict[str, float]:
        short = {"r1": "r@1", "r5": "r@5", "r10": "r@10"}
        return {short.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Retrieval:
    """Both directions over ``pairs`` pairs."""

    text_to_image: Direction
    image_to_text: Direction
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "text_to_image": self.text_to_image.to_dict(),
            "image_to_text": self.image_to_text.to_dict(),
            "pairs": self.pairs,
        }


def retrieval(images: Tensor, texts: Tensor, memory: int) -> Retrieval:
    """Paired retrieval of unit embeddings, float [N, D] each, in ``memory`` bytes."""
    return Retrieval(
        text_to_image=_figures(partner_ranks(texts, images, memory)),
        image_to_text=_figures(partner_ranks(images, texts, memory)),
        pairs=len(images),
    )


def partner_ranks(queries: Tensor, candidates: Tensor, memory: int) -> Tensor:
    """Rank of candidate i for query i, int64 [N], from 1; equal scores: lower index first."""
    own = torch.arange(len(queries))
    return ranks_of(queries, candidates, own, own, memory)


def _figures(ranks: Tensor) -> Direction:
    exact = ranks.double()
    hits = {k: (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return Direction(
        r1=hits[1],
        r5=hits[5],
        r10=hits[10],
        median_rank=median(exact),
        mrr=(1 / exact).mean().item(),
    )


def median(values: Tensor) -> float:
    """As numpy's; torch's own takes the lower of the two in the middle, and its ``quantile``
    refuses more than 16 million values."""
    ordered = values.sort().values
    middle = len(ordered) // 2
    return float((ordered[middle] + ordered[-middle - 1]) / 2)
