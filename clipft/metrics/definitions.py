"""Ranks -> figures per query, and the words that define them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

DIRECTIONS = ("text_to_image", "image_to_text")

PAIRED = {
    "r@1": "share of queries whose own partner ranks first",
    "r@5": "share of queries whose own partner is among the first 5",
    "r@10": "share of queries whose own partner is among the first 10",
    "mrr": "mean of 1 / rank of the own partner, over the full ranking",
    "mean_rank": "mean rank of the own partner, from 1",
    "median_rank": "median rank of the own partner, from 1",
}
"""Every pair is a query in both directions; only the other half of the same pair is right."""

GROUPED = {
    "hit@1": "share of queries with a right candidate ranked first",
    "hit@5": "share of queries with a right candidate among the first 5",
    "hit@10": "share of queries with a right candidate among the first 10",
    "recall@1": "share of a query's right candidates that are ranked first, mean over queries",
    "recall@5": "share of a query's right candidates among the first 5, mean over queries",
    "recall@10": "share of a query's right candidates among the first 10, mean over queries",
    "mrr": "mean of 1 / rank of the first right candidate, over the full ranking",
    "map": "mean over queries of the average precision: precision at each right candidate's "
    "rank, summed over the full ranking, by the number of right ones",
    "ndcg@10": "DCG of the first 10 (gain 1, discount log2(rank + 1)) by that of a perfect "
    "ranking, mean over queries",
    "r_precision": "precision among the first R, R the number of right candidates, mean over "
    "queries",
}
"""Each caption and each photo once; all that belong together are right."""

DEFINITIONS: dict[str, Any] = {
    "paired": {
        "protocol": "every pair is a query, only the other half of the same pair is right (as "
        "in the CLIP papers and open_clip)",
        **PAIRED,
        "ceiling": "the most that any model could reach: equal captions rank all photos "
        "alike, equal photos rank by position",
    },
    "grouped": {
        "protocol": "equal captions are one text, equal files one photo; every photo that any "
        "pair (or group) joins to the text is right, and the other way round",
        **GROUPED,
    },
    "ties": "equal scores rank by position, the lower first",
    "interval": "95 % percentile bootstrap over clusters of pairs that share a caption, a "
    "photo or a group; a difference is of the same resamples",
}

_CUTS = (1, 5, 10)

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PerQuery:
    """Figures of each query by name, float64 [Q] each; ``clusters`` int64 [Q]: those of one
    cluster are not independent."""

    figures: dict[str, Floats]
    clusters: Integers

    def __len__(self) -> int:
        return len(self.clusters)

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.figures.items()}

    def of(self, chosen: "np.ndarray[Any, np.dtype[np.bool_]]") -> "PerQuery":
        """Of some queries alone."""
        figures = {name: values[chosen] for name, values in self.figures.items()}
        return PerQuery(figures, self.clusters[chosen])


def paired_figures(ranks: Integers) -> dict[str, Floats]:
    """Of the rank of each query's partner, int64 [Q]."""
    exact = ranks.astype(np.float64)
    hits = {f"r@{k}": (ranks <= k).astype(np.float64) for k in _CUTS}
    return {**hits, "mrr": 1 / exact, "mean_rank": exact}


def ceiling_ranks(captions: Integers, photos: Integers) -> Integers:
    """The best ranks that any model could give partners, text to image, int64 [N]; swap the
    arguments for the other direction. Equal numbers are equal captions or photos.

    A pair's rank is at least its place among the copies of its photo. Queries of one caption
    rank alike, so no two of their ranks are equal: each is at least one more than the last.
    """
    copy = _place_among_equals(photos)
    order = np.lexsort((copy, captions))
    place = _place_among_equals(captions[order])
    # r_j = max(copy_j, r_j-1 + 1), so r_j - j is a running maximum, anew for each caption
    apart = (captions[order] - captions.min(initial=0)) * (len(captions) + 1)
    ranks = np.empty_like(captions)
    ranks[order] = np.maximum.accumulate(copy[order] - place + apart) - apart + place
    return ranks


def _place_among_equals(values: Integers) -> Integers:
    """1 for the first of equal values, 2 for the second, ..."""
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], values[order], side="left")
    places = np.empty_like(values)
    places[order] = np.arange(len(values)) - starts + 1
    return places


def grouped_figures(queries: Integers, ranks: Integers) -> dict[str, Floats]:
    """Of the rank of each right candidate: int64 [E] each, ``queries`` rising and each of
    them from 0 on with at least one."""
    order = np.lexsort((ranks, queries))
    ranks = ranks[order]
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    counts = np.diff(starts, append=len(queries))
    nth = np.arange(len(queries)) - np.repeat(starts, counts) + 1  # of the right ones so far
    first = ranks[starts]

    def summed(values: np.ndarray[Any, Any]) -> Floats:
        return np.add.reduceat(values.astype(np.float64), starts)

    figures = {f"hit@{k}": (first <= k).astype(np.float64) for k in _CUTS}
    figures |= {f"recall@{k}": summed(ranks <= k) / counts for k in _CUTS}
    discounts = 1 / np.log2(np.arange(10) + 2)
    gains = np.where(ranks <= 10, discounts[np.minimum(ranks, 10) - 1], 0)
    ideal = np.cumsum(discounts)[np.minimum(counts, 10) - 1]
    return figures | {
        "mrr": 1 / first,
        "map": summed(nth / ranks) / counts,
        "ndcg@10": summed(gains) / ideal,
        "r_precision": summed(ranks <= np.repeat(counts, counts)) / counts,
    }
