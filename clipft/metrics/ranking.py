"""Ranks of the right candidates, computed without ever holding the whole score matrix.

The rank of a candidate for a query is its place, counted from 1, when all candidates are sorted
by descending score (dot product); equal scores are sorted by ascending index. A candidate with NaN
comes after all others, and for a query with NaN, its candidate ranks last. Queries are processed in
blocks and only the wanted ranks of a block are kept, so memory does not grow with the number of
queries.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BYTES_PER_SCORE = 16
"""The score itself, its copy in the row of one right candidate, the comparison, and the scores that
repeated candidates copy (4 bytes each)."""
_FEWEST_ROWS = 16
"""The fewest rows in a block of scores. Matrix products of fewer rows are summed in another order,
so the last bits of a score would depend on the size of the block."""
_HASHED_ROWS = 1 << 14


def score_blocks(
    queries: Tensor, candidates: Tensor, size: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Score all candidates for ``size`` queries at a time, or for ``_FEWEST_ROWS`` if that is more.

    Equal candidates have equal scores to the last bit, so that their order is that of their index.

    Args:
        queries: float32 [Q, D].
        candidates: float32 [C, D], on the same device.
        size: the number of queries.

    Yields:
        (start, end, scores): float32 [end - start, C] of the queries from ``start`` to ``end``,
        in memory that the next block uses again.
    """
    original = _first_copies(candidates)
    copies = (original != torch.arange(len(original))).nonzero().flatten()
    originals = original[copies].to(candidates.device)
    copies = copies.to(candidates.device)
    for start, end, scores in _blocks(queries, candidates, size):
        if len(copies):
            scores[:, copies] = scores[:, originals]
        yield start, end, scores


def _blocks(queries: Tensor, candidates: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Score candidates as ``score_blocks`` does, without care for equal ones."""
    size, total = max(size, _FEWEST_ROWS), len(queries)
    # Allocated once: allocating for each block costs as much as the matrix products
    memory = candidates.new_empty(max(_FEWEST_ROWS, min(size, total)), len(candidates))
    for start in range(0, total, size):
        end = min(start + size, total)
        first = max(0, min(start, end - _FEWEST_ROWS))  # a short rest takes rows before it along
        some = queries[first:end]
        if total < _FEWEST_ROWS:
            some = some.repeat(_FEWEST_ROWS, 1)[:_FEWEST_ROWS]
        scores = torch.matmul(some, candidates.T, out=memory[: len(some)])
        yield start, end, scores[start - first : end - first]


def _first_copies(rows: Tensor) -> Tensor:
    """Find for each row of [C, D] the first one with the same bits: int64 [C] on the CPU."""
    device, bits = rows.device, rows.float().contiguous().view(torch.int32)
    odd = torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, rows.shape[1]) | 1)
    keys = [(part * odd.to(device)).sum(1).cpu() for part in torch.split(bits, _HASHED_ROWS)]
    _, first, which = np.unique(torch.cat(keys).numpy(), return_index=True, return_inverse=True)
    original = torch.from_numpy(first[which])
    later = (original != torch.arange(len(rows))).nonzero().flatten()
    equal = (bits[later.to(device)] == bits[original[later].to(device)]).all(1).cpu()
    original[later[~equal]] = later[~equal]  # only their keys are equal
    return original


@dataclass(frozen=True)
class _Distinct:
    """Candidates without copies, because many pairs of a catalogue share a caption.

    ``rows`` is float32 [U, D], and ``counts`` float32 [U] holds the number of candidates that are
    equal to each row, both on the device of the candidates. On the CPU, ``numbers`` int64 [C] is
    the row of each candidate, and ``later`` int64 [C] counts its copies with a higher index.
    """

    rows: Tensor
    counts: Tensor
    numbers: Tensor
    later: Tensor

    @classmethod
    def of(cls, candidates: Tensor) -> "_Distinct":
        original, total = _first_copies(candidates).numpy(), len(candidates)
        kept, numbers, counts = np.unique(original, return_inverse=True, return_counts=True)
        order = np.argsort(numbers, kind="stable")
        later = np.empty(total, np.int64)
        later[order] = np.cumsum(counts)[numbers[order]] - 1 - np.arange(total)
        rows = candidates
        if len(kept) < total:
            rows = candidates[torch.from_numpy(kept).to(candidates.device)]
        weights = torch.from_numpy(counts).float().to(candidates.device)
        return cls(rows, weights, torch.from_numpy(numbers), torch.from_numpy(later))

    def count_behind(
        self, scores: Tensor, columns: Tensor, compared: Tensor, finite: bool
    ) -> Tensor:
        """Count the candidates that rank behind candidate ``columns[i]`` in row i.

        Args:
            scores: float32 [E, U].
            columns: int64 [E] on the CPU.
            compared: memory like that of ``scores``.
            finite: whether no score is NaN.

        Returns:
            int64 [E] on the device of ``scores``; 0 where the candidate's own score is NaN.
        """
        own = scores.gather(1, self.numbers[columns, None].to(scores.device))
        later = self.later[columns].to(scores.device)
        # Comparisons are written as floats because torch sums floats ten times faster than booleans
        behind = self._count(torch.lt(scores, own, out=compared)) + later
        tied = torch.eq(scores, own, out=compared).sum(1) > 1
        # One row at a time, so that no array is allocated. The number of tied rows differs from
        # block to block, and arrays of different sizes would fragment the memory
        for row in tied.nonzero().flatten().tolist():
            behind[row] += self._count_after(compared[row], int(columns[row])) - later[row]
        if finite:
            return behind
        # No comparison holds for NaN, and the NaN of other candidates are behind every number
        behind += self._count(torch.isnan(scores).to(compared.dtype))
        return torch.where(own.flatten().isnan(), 0, behind)

    def _count(self, chosen: Tensor) -> Tensor:
        """Count the candidates of ``chosen``, float32 [E, U] of 0 and 1, which it changes."""
        weighted = chosen.mul_(self.counts) if self._has_copies else chosen
        return weighted.sum(1).long()

    def _count_after(self, chosen: Tensor, candidate: int) -> Tensor:
        """Count the candidates of ``chosen``, float32 [U], that come after ``candidate``."""
        if not self._has_copies:
            return chosen[candidate + 1 :].sum().long()
        return chosen[self.numbers[candidate + 1 :].to(chosen.device)].sum().long()

    @property
    def _has_copies(self) -> bool:
        return len(self.rows) < len(self.numbers)


@torch.inference_mode()
def ranks_of(
    queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor, memory: int
) -> Tensor:
    """Rank candidate ``columns[i]`` for query ``rows[i]``, exactly up to 2^24 candidates.

    A query that is in no row costs nothing.

    Args:
        queries: float32 [Q, D].
        candidates: float32 [C, D], on the same device.
        rows: int64 [E], ascending.
        columns: int64 [E].
        memory: limit in bytes of the scores held at a time; those of ``_FEWEST_ROWS`` queries
            always are.

    Returns:
        int64 [E] on the CPU.
    """
    asked, numbers = torch.unique_consecutive(rows, return_inverse=True)
    if len(asked) < len(queries):
        queries, rows = queries[asked.to(queries.device)], numbers
    distinct = _Distinct.of(candidates)
    size = min(memory // (_BYTES_PER_SCORE * max(1, len(distinct.rows))), len(queries))
    size = max(size, _FEWEST_ROWS)
    all_picked, all_compared = candidates.new_empty(2, size, len(distinct.rows))
    all_finite = bool(torch.isfinite(queries).all() & torch.isfinite(candidates).all())
    ranks = torch.empty(len(rows), dtype=torch.int64)
    for start, end, scores in _blocks(queries, distinct.rows, size):
        first, last = torch.searchsorted(rows.contiguous(), torch.tensor([start, end])).tolist()
        for at in range(first, last, size):
            until = min(at + size, last)
            if torch.equal(rows[at:until], torch.arange(start, end)):  # each query once
                picked = scores
            else:
                own_row = (rows[at:until] - start).to(scores.device)
                picked = torch.index_select(scores, 0, own_row, out=all_picked[: until - at])
            compared = all_compared[: until - at]
            behind = distinct.count_behind(picked, columns[at:until], compared, all_finite)
            ranks[at:until] = len(candidates) - behind  # counted from the back because of NaN
    return ranks


def partner_ranks(queries: Tensor, candidates: Tensor, memory: int) -> Tensor:
    """Rank candidate i for query i, as ``ranks_of`` does; returns int64 [N], counted from 1."""
    own = torch.arange(len(queries))
    return ranks_of(queries, candidates, own, own, memory)


@dataclass(frozen=True)
class Retrieval:
    """Paired retrieval in both directions over ``pairs`` images, as measured after each epoch.

    ``queries`` of them were queries. Each direction maps ``r@1``, ``r@5``, ``r@10`` and ``mrr`` to
    shares in 0..1, and ``median_rank`` to a rank counted from 1.
    """

    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    pairs: int
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values of ``metrics.jsonl`` and ``result.json``."""
        return asdict(self)


def drawn_queries(pairs: int, most: int, seed: int) -> Tensor:
    """Draw the pairs whose captions and images are queries: int64, ascending.

    These are all pairs if ``most`` is 0 or at least as many.
    """
    if not 0 < most < pairs:
        return torch.arange(pairs)
    drawn = np.random.default_rng(seed).choice(pairs, most, replace=False)
    return torch.from_numpy(np.sort(drawn))


def paired_ranks(
    images: Tensor, texts: Tensor, owners: Tensor, memory: int, asked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rank the image of each text, and for each image the first of its texts in the ranking.

    Args:
        images: float32 [N, D].
        texts: float32 [T, D].
        owners: int64 [T], the image of each text, ascending; each image has at least one.
        memory: limit in bytes of the scores held at a time.
        asked: int64 [Q], ascending, the images that are queries, with their texts; None for all.

    Returns:
        int64 [texts of the queries] from text to image and int64 [Q] from image to text, counted
        from 1.
    """
    owners, asked = owners.cpu(), torch.arange(len(images)) if asked is None else asked
    own_texts = torch.isin(owners, asked).nonzero().flatten()
    owners = owners[own_texts]
    to_image = ranks_of(texts, images, own_texts, owners, memory)
    to_text = ranks_of(images, texts, owners, own_texts, memory)
    last = torch.full((len(asked),), len(texts))
    return to_image, last.scatter_reduce(0, torch.searchsorted(asked, owners), to_text, "amin")


def retrieval(
    images: Tensor,
    texts: Tensor,
    memory: int,
    owners: Tensor | None = None,
    asked: Tensor | None = None,
) -> Retrieval:
    """Measure paired retrieval of unit embeddings.

    Args:
        images: float32 [N, D].
        texts: float32 [T, D].
        memory: limit in bytes of the scores held at a time.
        owners: int64 [T], the image of each text, ascending; None if text i belongs to image i.
        asked: as for ``paired_ranks``.
    """
    owners = torch.arange(len(texts)) if owners is None else owners
    return retrieval_of_ranks(*paired_ranks(images, texts, owners, memory, asked), len(images))


def retrieval_of_ranks(text_to_image: Tensor, image_to_text: Tensor, pairs: int) -> Retrieval:
    """Summarize the ranks of ``paired_ranks`` among so many ``pairs``."""
    queries = len(image_to_text)
    return Retrieval(_figures(text_to_image), _figures(image_to_text), pairs, queries)


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
