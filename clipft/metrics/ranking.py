"""Ranks of the right candidates, computed without ever holding the whole score matrix.

The rank of a candidate for a query is its place, counted from 1, when all candidates are sorted
by falling score (dot product); equal scores are sorted by rising index. Queries are processed in
blocks and only the wanted ranks of a block are kept, so memory does not grow with the number of
queries.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_BYTES_PER_SCORE = 14
"""The score itself, its copy in the row of one right candidate, the comparison (4 bytes each),
and what ties take at worst."""


@torch.inference_mode()
def ranks_of(
    queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor, memory: int
) -> Tensor:
    """Rank candidate ``columns[i]`` for query ``rows[i]``, exactly up to 2^24 candidates.

    Args:
        queries: float32 [Q, D].
        candidates: float32 [C, D], on the same device.
        rows: int64 [E], ascending.
        columns: int64 [E].
        memory: limit in bytes of the scores held at a time; at least one query's are held.

    Returns:
        int64 [E] on the CPU. NaN ranks last.
    """
    size = max(1, min(memory // (_BYTES_PER_SCORE * max(1, len(candidates))), len(queries)))
    # Allocated once: allocating for each block costs as much as the matrix products
    all_scores, all_picked, all_compared = (
        torch.empty((size, len(candidates)), dtype=candidates.dtype, device=candidates.device)
        for _ in range(3)
    )
    index = torch.arange(len(candidates), device=candidates.device)
    bounds = torch.searchsorted(rows.contiguous(), torch.arange(0, len(queries) + size, size))
    ranks = [torch.empty(0, dtype=torch.int64)]
    for block, start in enumerate(range(0, len(queries), size)):
        some = queries[start : start + size]
        scores = torch.matmul(some, candidates.T, out=all_scores[: len(some)])
        first, last = int(bounds[block]), int(bounds[block + 1])
        for at in range(first, last, size):
            end = min(at + size, last)
            own_row = (rows[at:end] - start).to(scores.device)
            own_column = columns[at:end, None].to(scores.device)
            picked = torch.index_select(scores, 0, own_row, out=all_picked[: end - at])
            own = picked.gather(1, own_column)
            # Counted from the back: no comparison holds for NaN, so NaN ranks last. Comparisons
            # are written as floats because torch sums floats ten times faster than booleans.
            compared = all_compared[: end - at]
            behind = torch.lt(picked, own, out=compared).sum(1).long()
            tied = torch.eq(picked, own, out=compared).sum(1) > 1
            for few in torch.split(tied.nonzero().flatten(), -(-size // 4)):
                later = (picked[few] == own[few]) & (index > own_column[few])
                behind[few] += later.sum(1)
            ranks.append((picked.shape[1] - behind).cpu())
    return torch.cat(ranks)


def partner_ranks(queries: Tensor, candidates: Tensor, memory: int) -> Tensor:
    """Rank candidate i for query i, as ``ranks_of`` does; returns int64 [N], counted from 1."""
    own = torch.arange(len(queries))
    return ranks_of(queries, candidates, own, own, memory)


@dataclass(frozen=True)
class Retrieval:
    """Paired retrieval in both directions over ``pairs`` pairs, as measured after each epoch.

    Each direction maps ``r@1``, ``r@5``, ``r@10`` and ``mrr`` to shares in 0..1, and
    ``median_rank`` to a rank counted from 1.
    """

    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values of ``metrics.jsonl`` and ``result.json``."""
        return asdict(self)


def retrieval(images: Tensor, texts: Tensor, memory: int) -> Retrieval:
    """Measure paired retrieval of unit embeddings.

    Args:
        images, texts: float32 [N, D]; row i of both is pair i.
        memory: limit in bytes of the scores held at a time.
    """
    return retrieval_of_ranks(
        partner_ranks(texts, images, memory), partner_ranks(images, texts, memory)
    )


def retrieval_of_ranks(text_to_image: Tensor, image_to_text: Tensor) -> Retrieval:
    """Summarize the ranks of the partners in both directions, [N] each, counted from 1."""
    return Retrieval(_figures(text_to_image), _figures(image_to_text), len(text_to_image))


def _figures(ranks: Tensor) -> dict[str, float]:
    exact = ranks.double()
    # torch.median takes the lower of the two in the middle, and torch.quantile refuses more
    # than 16 million values
    ordered, middle = exact.sort().values, len(exact) // 2
    return {
        **{f"r@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)},
        "median_rank": float((ordered[middle] + ordered[-middle - 1]) / 2),
        "mrr": (1 / exact).mean().item(),
    }
