"""How far a figure would move with other data: the cluster bootstrap.

Whole clusters are drawn with replacement and each figure is taken anew as the mean over the
queries drawn (Efron & Tibshirani 1993, chapter 13: percentile intervals). The draws follow from
the seed and the number of clusters alone: two models measured on the same pairs meet the same
draws, so the differences of their draws give the interval of their difference.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipft.metrics.definitions import Floats, Integers, PerQuery

CONFIDENCE = 0.95
_CELLS = 1 << 23
"""Weights held at a time."""


def resampled(samples: Sequence[PerQuery], resamples: int, seed: int) -> list[dict[str, Floats]]:
    """For each sample: name -> its mean in each resample, float64 [resamples].

    All samples are of the same clusters, and each resample draws the same ones for all.
    Not-a-number where a resample drew no query of a sample.
    """
    clusters = 1 + max(int(sample.clusters.max()) for sample in samples)
    summed = [_per_cluster(sample, clusters) for sample in samples]
    widths = np.cumsum([columns.shape[1] for columns in summed])[:-1]
    table = np.concatenate(summed, axis=1)
    drawn = np.concatenate([w @ table for w in _weights(clusters, resamples, seed)])
    found = []
    for sample, totals in zip(samples, np.split(drawn, widths, axis=1), strict=True):
        with np.errstate(invalid="ignore"):
            means = totals[:, 1:] / totals[:, :1]
        found.append(dict(zip(sample.figures, means.T, strict=True)))
    return found


def _per_cluster(sample: PerQuery, clusters: int) -> Floats:
    """Queries, and the sum of each figure, in each cluster: [clusters, 1 + figures]."""
    columns: list[Floats | None] = [None, *sample.figures.values()]
    return np.stack(
        [np.bincount(sample.clusters, values, clusters).astype(np.float64) for values in columns],
        axis=1,
    )


def _weights(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn: [some resamples, clusters] at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CELLS // clusters)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        draws: Integers = random.integers(0, clusters, (size, clusters))
        draws += np.arange(size)[:, None] * clusters
        counts = np.bincount(draws.ravel(), minlength=size * clusters)
        yield counts.reshape(size, clusters).astype(np.float64)


def interval(draws: Floats) -> dict[str, Any]:
    """``low`` and ``high`` of the middle 95 %; both None where nothing was drawn."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return {"low": None, "high": None}
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return {"low": float(low), "high": float(high)}
