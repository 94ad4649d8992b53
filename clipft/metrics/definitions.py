"""Figures per query from ranks, and the sentences that define them for the user."""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

PAIRED = {
    "r@1": "share of queries whose partner ranks first",
    "r@5": "share of queries whose partner is among the first 5",
    "r@10": "share of queries whose partner is among the first 10",
    "mrr": "mean of 1 / rank of the partner, over the full ranking",
    "mean_rank": "mean rank of the partner, counted from 1",
    "median_rank": "median rank of the partner, counted from 1",
}
"""Every image and every caption is a query, and only its own partner is right."""

GROUPED = {
    "hit@1": "share of queries with a right candidate ranked first",
    "hit@5": "share of queries with a right candidate among the first 5",
    "hit@10": "share of queries with a right candidate among the first 10",
    "recall@1": "share of a query's right candidates that are ranked first, mean over queries",
    "recall@5": "share of a query's right candidates among the first 5, mean over queries",
    "recall@10": "share of a query's right candidates among the first 10, mean over queries",
    "mrr": "mean of 1 / rank of the first right candidate, over the full ranking",
    "map": "mean average precision: the precision at the rank of each right candidate, averaged "
    "over a query's right candidates in the full ranking, mean over queries",
    "ndcg@10": "DCG of the first 10 (gain 1, discount log2(rank + 1)) divided by the DCG of a "
    "perfect ranking, mean over queries",
    "r_precision": "precision among the first R, where R is the number of right candidates, mean "
    "over queries",
}
"""Each distinct caption and image counts once; everything that belongs together is right."""

PHOTOS = {name: GROUPED[name] for name in ("hit@1", "hit@5", "hit@10", "map")}
"""If a product has several distinct images, each is a query for the others."""

GRADED = {
    "ndcg@10": "DCG of the first 10 (gain: the grade, discount log2(rank + 1)) divided by the DCG "
    "of a perfect ranking, mean over queries",
}
"""By grades, where a field of the metadata gives them."""

DEFINITIONS: dict[str, Any] = {
    "paired": {
        "protocol": "every image and every caption is a query, and only its own partner is right "
        "(as in the CLIP papers and open_clip); of several captions of an image, the one that "
        "ranks first counts",
        **PAIRED,
        "ceiling": "upper bound: the best that any model could reach, because equal captions "
        "rank all images alike and equal images rank by position",
    },
    "grouped": {
        "protocol": "equal captions count as one text, and equal files as one image; an image and "
        "a text are right for each other if any pair (or group) has both",
        **GROUPED,
    },
    "photos": {
        "protocol": "another photo of the same product: each distinct image of a group that has "
        "several is a query among all other images, and those of its group are right",
        **PHOTOS,
    },
    "graded": {
        "protocol": "each distinct caption and image with a grade above 0 is a query; the grade of "
        "a pair says how relevant its image is to its captions",
        **GRADED,
    },
    "classification": {
        "protocol": "an image is given the label whose prompts are nearest to it, on average; the "
        "fine-tuned model is compared with classifiers on the features of the pretrained one",
        "zero_shot": "the same prompts, with the pretrained model",
        "linear": "logistic regression on the training images",
        "tip_adapter": "prompts, and votes of the training images (Tip-Adapter, Zhang et al. 2022)",
    },
    "ties": "candidates with equal scores are ranked by their position in the data set",
    "interval": "95% percentile bootstrap over clusters of pairs that share a caption, an "
    "image or a group; a difference uses the same resamples for both models",
}

_CUTOFFS = (1, 5, 10)

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PerQuery:
    """Figures of Q queries by name, float64 [Q] each.

    ``clusters``, int64 [Q], numbers the cluster of each query from 0. The queries of one cluster
    are not independent of each other.
    """

    figures: dict[str, Floats]
    clusters: Integers

    def means(self) -> dict[str, float]:
        """Average each figure over the queries; ranks also give their median."""
        found = {name: float(values.mean()) for name, values in self.figures.items()}
        if "mean_rank" in self.figures:
            found["median_rank"] = float(np.median(self.figures["mean_rank"]))
        return found


def paired_figures(ranks: Integers) -> dict[str, Floats]:
    """Compute R@K and MRR of each query from the rank of its partner.

    Args:
        ranks: int64 [Q], counted from 1.

    Returns:
        Name -> float64 [Q]. R@K is that of CLIP (Radford et al. 2021) and open_clip.
    """
    exact = ranks.astype(np.float64)
    hits = {f"r@{k}": (ranks <= k).astype(np.float64) for k in _CUTOFFS}
    return {**hits, "mrr": 1 / exact, "mean_rank": exact}


def upper_bound_ranks(
    captions: Integers, images: Integers, owners: Integers
) -> tuple[Integers, Integers]:
    """Return the best partner ranks that any model could reach, in both directions.

    A partner ranks no better than its place among its copies, because equal candidates score alike
    and ties rank by position. Equal queries see the same ranking, so no two of them with different
    partners share a rank.

    Args:
        captions: int64 [T], equal numbers for equal captions.
        images: int64 [N], equal numbers for equal images.
        owners: int64 [T], the image of each caption, ascending.

    Returns:
        int64 [T] from text to image and int64 [N] from image to text, counted from 1.
    """
    # A caption that an image has twice is one query with one partner, which counts twice
    (texts, partners), which, counts = np.unique(
        [captions, owners], axis=1, return_inverse=True, return_counts=True
    )
    to_image = _ranks_apart(texts, places_among_equals(images)[partners], counts)[which]
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    best_of_own = np.minimum.reduceat(places_among_equals(captions), first)
    return to_image, _ranks_apart(images, best_of_own, np.ones_like(images))


def _ranks_apart(queries: Integers, least: Integers, weights: Integers) -> Integers:
    """Give equal queries different ranks, as low as possible but not below their own ``least``.

    If two queries could have a rank, the one with the larger weight gets it. The other can still
    get the next rank, so this is best for every cutoff and for the mean.
    """
    order = np.lexsort((least, queries))
    place = places_among_equals(queries[order])
    # rank_j = max(least_j, rank_(j-1) + 1), so rank_j - j is a running maximum. The offset grows
    # by more than any rank from one query to the next, which starts the maximum afresh.
    most = len(queries) + int(least.max(initial=0))
    offset = (queries[order] - queries.min(initial=0)) * (most + 1)
    ranks = np.empty_like(queries)
    ranks[order] = np.maximum.accumulate(least[order] - place + offset) - offset + place
    starts = np.flatnonzero(place == 1)
    if len(starts):  # where the weights are equal, so are all orders of the queries
        lightest, heaviest = (f.reduceat(weights[order], starts) for f in (np.minimum, np.maximum))
        groups = np.split(order, starts[1:])
        for group in np.flatnonzero(lightest < heaviest):
            ranks[groups[group]] = _heaviest_first(least[groups[group]], weights[groups[group]])
    return ranks


def _heaviest_first(least: Integers, weights: Integers) -> list[int]:
    """Give each of n queries a rank of its own; ``least``, ascending, is the first it may have."""
    ranks, waiting, rank, following = [0] * len(least), list[tuple[int, int]](), 0, 0
    while following < len(least) or waiting:
        rank += 1
        while following < len(least) and least[following] <= rank:
            heapq.heappush(waiting, (-int(weights[following]), following))
            following += 1
        if waiting:
            ranks[heapq.heappop(waiting)[1]] = rank
    return ranks


def places_among_equals(values: Integers) -> Integers:
    """Number equal values in order of appearance: 1 for the first, 2 for the second, ..."""
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], values[order], side="left")
    places = np.empty_like(values)
    places[order] = np.arange(len(values)) - starts + 1
    return places


def grouped_figures(queries: Integers, ranks: Integers) -> dict[str, Floats]:
    """Compute the figures of queries that may have several right candidates.

    The formulas are those of Manning, Raghavan & Schuetze 2008, chapter 8, and for nDCG with
    binary gains those of Jarvelin & Kekalainen 2002.

    Args:
        queries: int64 [E], the query of each right candidate, ascending; every query from 0
            to Q - 1 has at least one.
        ranks: int64 [E], the rank of each right candidate, counted from 1.

    Returns:
        Name -> float64 [Q].
    """
    ranks = ranks[np.lexsort((ranks, queries))]  # ascending within each query
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    counts = np.diff(starts, append=len(queries))
    nth = np.arange(len(queries)) - np.repeat(starts, counts) + 1  # right candidates so far
    first = ranks[starts]

    def summed(values: np.ndarray[Any, Any]) -> Floats:
        return np.add.reduceat(values.astype(np.float64), starts)

    figures = {f"hit@{k}": (first <= k).astype(np.float64) for k in _CUTOFFS}
    figures |= {f"recall@{k}": summed(ranks <= k) / counts for k in _CUTOFFS}
    discounts = 1 / np.log2(np.arange(10) + 2)
    gains = np.where(ranks <= 10, discounts[np.minimum(ranks, 10) - 1], 0)
    ideal = np.cumsum(discounts)[np.minimum(counts, 10) - 1]
    return figures | {
        "mrr": 1 / first,
        "map": summed(nth / ranks) / counts,
        "ndcg@10": summed(gains) / ideal,
        "r_precision": summed(ranks <= np.repeat(counts, counts)) / counts,
    }
