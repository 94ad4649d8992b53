"""Paired retrieval, as in the CLIP papers and open_clip.

Row i of the images belongs to row i of the texts. The rank of a query is the place of its
own partner among all candidates, from 1, ties going to the lower index. R@K is the share
of queries ranked K or better; MRR is the mean of 1 / rank. Two pairs with one caption are
not each other's partners, so duplicates cap what any model can reach.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 1024
"""Queries compared at once: bounds the memory to a block times the candidates."""


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


def retrieval(images: Tensor, texts: Tensor) -> Retrieval:
    """Paired retrieval of unit embeddings, float [N, D] each."""
    return Retrieval(
        text_to_image=_figures(partner_ranks(texts, images)),
        image_to_text=_figures(partner_ranks(images, texts)),
        pairs=len(images),
    )


def partner_ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank of candidate i for query i, int64 [N], from 1; equal scores: lower index first."""
    ranks = []
    index = torch.arange(len(candidates), device=candidates.device)
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ candidates.T
        own_index = index[start : start + _BLOCK, None]
        own = scores.gather(1, own_index)
        # Put so that not-a-number, which no comparison holds for, ranks last and not first
        behind = (scores < own) | ((scores == own) & (index > own_index))
        ahead = ~behind & (index != own_index)
        ranks.append(ahead.sum(1) + 1)
    return torch.cat(ranks)


def _figures(ranks: Tensor) -> Direction:
    exact = ranks.double()
    hits = {k: (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return Direction(
        r1=hits[1],
        r5=hits[5],
        r10=hits[10],
        median_rank=exact.quantile(0.5).item(),
        mrr=(1 / exact).mean().item(),
    )


def validation_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    """CLIP's loss over the whole set as one batch, whatever the batches it came in."""
    losses = (_mean_loss(images, texts, scale), _mean_loss(texts, images, scale))
    return sum(losses) / 2


def _mean_loss(queries: Tensor, candidates: Tensor, scale: float) -> float:
    total = 0.0
    target = torch.arange(len(candidates), device=candidates.device)
    for start in range(0, len(queries), _BLOCK):
        logits = scale * queries[start : start + _BLOCK] @ candidates.T
        block = target[start : start + _BLOCK]
        total += functional.cross_entropy(logits, block, reduction="sum").item()
    return total / len(queries)
