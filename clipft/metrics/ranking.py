"""Where the right candidates stand among all, without ever holding the whole matrix.

The rank of a candidate for a query is its place from 1 by falling score (dot product), equal
scores by rising index. Queries are taken in blocks; of each block's scores only the ranks that
are asked for are kept, so memory is a block's, whatever the number of queries.
"""

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
