"""Confidence intervals from the cluster bootstrap.

Whole clusters are resampled with replacement, and each figure is recomputed as the mean over the
queries of the resampled clusters (percentile intervals: Efron & Tibshirani 1993, chapter 13). The
resamples depend only on the seed and the number of clusters. Two models measured on the same pairs
therefore have the same resamples, and subtracting them resample by resample gives the interval of
their difference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipft.metrics.definitions import Floats, Integers, PerQuery

CONFIDENCE = 0.95
_MAX_WEIGHTS = 1 << 23
"""Bootstrap weights held in memory at a time (64 MiB as float64)."""


def resampled(samples: Sequence[PerQuery], resamples: int, seed: int) -> list[dict[str, Floats]]:
    """Recompute the mean of every figure in each resample.

    All samples share one numbering of clusters, and each resample uses the same clusters for
    all of them.

    Returns:
        For each sample, name -> float64 [resamples]: the figure's mean in each resample, NaN
        where a resample holds no query of the sample. Empty if ``resamples`` is 0.
    """
    if not resamples:
        return [{} for _ in samples]
    clusters = 1 + max(int(sample.clusters.max()) for sample in samples)
    # For each sample: the number of queries per cluster, then the sum of each figure per cluster
    sums = []
    for sample in samples:
        columns: list[Floats | None] = [None, *sample.figures.values()]
        counted = [np.bincount(sample.clusters, values, clusters) for values in columns]
        sums.append(np.stack([column.astype(np.float64) for column in counted], axis=1))
    table = np.concatenate(sums, axis=1)  # [clusters, columns of all samples]

    random = np.random.default_rng(seed)
    rows = max(1, _MAX_WEIGHTS // clusters)
    totals = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        picked: Integers = random.integers(0, clusters, (size, clusters))
        picked += np.arange(size)[:, None] * clusters  # so that one bincount serves all rows
        weights = np.bincount(picked.ravel(), minlength=size * clusters).reshape(size, clusters)
        totals.append(weights.astype(np.float64) @ table)

    ends = np.cumsum([columns.shape[1] for columns in sums])[:-1]
    found = []
    for sample, total in zip(samples, np.split(np.concatenate(totals), ends, axis=1), strict=True):
        with np.errstate(invalid="ignore"):  # 0 / 0 where a resample holds no query
            means = total[:, 1:] / total[:, :1]
        found.append(dict(zip(sample.figures, means.T, strict=True)))
    return found


def interval(resampled_values: Floats) -> dict[str, Any]:
    """Return ``low`` and ``high`` of the middle 95% of float64 [resamples], ignoring NaN.

    Both are None if no value is left.
    """
    known = resampled_values[~np.isnan(resampled_values)]
    if not len(known):
        return {"low": None, "high": None}
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return {"low": float(low), "high": float(high)}
