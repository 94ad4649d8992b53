"""Where the right candidates stand among all, without ever holding the whole matrix.

The rank of a candidate for a query is its place from 1 by falling score (dot product), equal
scores by rising index. Queries are taken in blocks; of each block's scores only the ranks that
are asked for are kept, so memory is a block's, whatever the number of queries.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_BYTES = 14
"""Of a score in flight: itself, its row's copy for one right candidate, the comparison, and
what ties take at worst."""


@torch.inference_mode()
def ranks_of(
    queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor, memory: int
) -> Tensor:
    """The rank of candidate ``columns[i]`` for query ``rows[i]``, int64 [E], on the CPU.

    ``queries`` float32 [Q, D], ``candidates`` float32 [C, D], both on one device; ``rows``
    rising. ``memory`` bytes bound the scores held at a time (one query's are the least).
    Not-a-number ranks last. Exact up to 2^24 candidates.
    """
    room = _Room(candidates, memory, len(queries))
    size = room.size
    bounds = torch.searchsorted(rows.contiguous(), torch.arange(0, len(queries) + size, size))
    ranks = [torch.empty(0, dtype=torch.int64)]
    for block, start in enumerate(range(0, len(queries), size)):
        scores = room.scored(queries[start : start + size])
        first, last = int(bounds[block]), int(bounds[block + 1])
        for at in range(first, last, size):
            end = min(at + size, last)
            own_rows = (rows[at:end] - start).to(scores.device)
            ranks.append(room.ranks(scores, own_rows, columns[at:end].to(scores.device)).cpu())
    return torch.cat(ranks)


class _Room:
    """The blocks' memory, taken once: taking it anew costs as much as the products."""

    def __init__(self, candidates: Tensor, memory: int, queries: int) -> None:
        self.candidates = candidates
        self.size = max(1, min(memory // (_BYTES * max(1, len(candidates))), queries))
        shape = (self.size, len(candidates))
        self._scores, self._picked, self._compared = (
            torch.empty(shape, dtype=candidates.dtype, device=candidates.device) for _ in range(3)
        )

    def scored(self, queries: Tensor) -> Tensor:
        """All candidates for some queries, [Q, C]."""
        return torch.matmul(queries, self.candidates.T, out=self._scores[: len(queries)])

    def ranks(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Rank of one column each in ``rows`` of ``scores``; int64 [B].

        Counted from the back, so that not-a-number, which no comparison holds for, ranks last.
        Comparisons are written as floats: torch adds those ten times faster than booleans.
        """
        picked = torch.index_select(scores, 0, rows, out=self._picked[: len(rows)])
        own = picked.gather(1, columns[:, None])
        compared = self._compared[: len(rows)]
        behind = torch.lt(picked, own, out=compared).sum(1).long()
        tied = torch.eq(picked, own, out=compared).sum(1) > 1
        index = torch.arange(picked.shape[1], device=picked.device)
        for some in torch.split(tied.nonzero().flatten(), -(-self.size // 4)):
            later = (picked[some] == own[some]) & (index > columns[some, None])
            behind[some] += later.sum(1)
        return picked.shape[1] - behind


_BYTES_retrieval = 12
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
