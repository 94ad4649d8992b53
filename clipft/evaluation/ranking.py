"""Where the right candidates stand among all, without ever holding the whole matrix.

The rank of a candidate for a query is its place from 1 by falling score (dot product), equal
scores by rising index. Queries are taken in blocks; of each block's scores only the ranks that
are asked for are kept, so memory is a block's, whatever the number of queries.
"""

import torch
from torch import Tensor

_BYTES = 12
"""Of a score in flight: itself, its row's copy for one right candidate, the comparison."""


def ranks_of(
    queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor, memory: int
) -> Tensor:
    """The rank of candidate ``columns[i]`` for query ``rows[i]``, int64 [E], on the CPU.

    ``queries`` float32 [Q, D], ``candidates`` float32 [C, D], both on one device; ``rows``
    rising. ``memory`` bytes bound the scores held at a time (one query's are the least).
    Not-a-number ranks last. Exact up to 2^24 candidates.
    """
    size = max(1, memory // (_BYTES * max(1, len(candidates))))
    bounds = torch.searchsorted(rows.contiguous(), torch.arange(0, len(queries) + size, size))
    ranks = [torch.empty(0, dtype=torch.int64)]
    for block, start in enumerate(range(0, len(queries), size)):
        scores = queries[start : start + size] @ candidates.T
        first, last = int(bounds[block]), int(bounds[block + 1])
        for at in range(first, last, size):
            end = min(at + size, last)
            own_rows = (rows[at:end] - start).to(scores.device)
            ranks.append(_ranks(scores[own_rows], columns[at:end].to(scores.device)).cpu())
    return torch.cat(ranks)


def _ranks(scores: Tensor, columns: Tensor) -> Tensor:
    """Rank of one column in each row of ``scores``, float [B, C]; int64 [B].

    Counted from the back, so that not-a-number, which no comparison holds for, ranks last.
    Comparisons are written as floats: torch adds those ten times faster than booleans.
    """
    own = scores.gather(1, columns[:, None])
    compared = torch.empty_like(scores)
    behind = torch.lt(scores, own, out=compared).sum(1).long()
    tied = torch.eq(scores, own, out=compared).sum(1) > 1
    if tied.any():
        index = torch.arange(scores.shape[1], device=scores.device)
        later = (scores[tied] == own[tied]) & (index > columns[tied, None])
        behind[tied] += later.sum(1)
    return scores.shape[1] - behind
