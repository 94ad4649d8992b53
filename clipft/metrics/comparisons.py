"""The significance of a difference: over seeds, over queries, and among several comparisons.

Ablations, searches and soups compare runs with these functions. Comparisons are paired, because two
runs with the same seed, or two models with the same queries, share much of their random variation.

- Over seeds: the mean difference with Student's t interval and the p-value of the paired t-test.
- Over queries: the percentiles of resampled differences (see ``metrics.bootstrap``).
- Over both: the percentiles when seeds and queries are resampled independently.
- Several comparisons with one reference: p-values adjusted by Holm's method.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from clipft.metrics.bootstrap import CONFIDENCE
from clipft.metrics.bootstrap import interval as percentiles
from clipft.metrics.definitions import Floats

ALPHA = 1 - CONFIDENCE
"""A difference is clear if its p-value, adjusted for the number of comparisons, is below this."""

Values = Mapping[int, float]
"""Seed -> value."""


def differences(one: Values, other: Values) -> dict[int, float]:
    """Subtract ``other`` from ``one`` for each seed that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def spread(values: Values) -> dict[str, Any]:
    """Return the mean, the sample standard deviation, ``low`` and ``high`` of the mean's 95%
    interval, and the values. Of fewer than two values there is no deviation and no interval."""
    low, high = interval(values) or (None, None)
    return {
        "mean": fmean(values.values()) if values else None,
        "sd": stdev(values.values()) if len(values) > 1 else None,
        "low": low,
        "high": high,
        "values": {str(seed): value for seed, value in values.items()},
    }


def interval(values: Values) -> tuple[float, float] | None:
    """Return the 95% interval of the mean by Student's t; None for fewer than two values."""
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        return None
    reach = float(stdtrit(count - 1, 1 - ALPHA / 2)) * stdev(values.values()) / math.sqrt(count)
    mean = fmean(values.values())
    return mean - reach, mean + reach


def p_value(values: Values) -> float | None:
    """Return the two-sided p-value of a mean of 0 by Student's t; None for fewer than two values.

    Given differences of pairs, this is the paired t-test.
    """
    from scipy.special import stdtr

    count = len(values)
    if count < 2:
        return None
    mean, error = fmean(values.values()), stdev(values.values()) / math.sqrt(count)
    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(count - 1, -abs(mean) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979), in the order given.

    If differences count as real where the adjusted value is below 0.05, the probability of even one
    false finding is at most 0.05. The tests may depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def against_reference(by_name: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """Compare several things with the same reference.

    Args:
        by_name: the difference to the reference for each seed, by the name of what is compared.

    Returns:
        For each name, its ``spread`` with three more keys: ``p`` of the paired t-test,
        ``p_adjusted`` by Holm's method, and ``clear``, True if the latter is below 0.05. They are
        None for fewer than two seeds, which do not count as a comparison.
    """
    tested = {name: p for name, values in by_name.items() if (p := p_value(values)) is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: {
            **spread(values),
            "p": tested.get(name),
            "p_adjusted": adjusted.get(name),
            "clear": adjusted[name] < ALPHA if name in adjusted else None,
        }
        for name, values in by_name.items()
    }


def paired_difference(value: float, ours: Floats, theirs: Floats) -> dict[str, Any]:
    """Return ``value``, a difference over queries, with ``low``, ``high`` and ``clear``.

    Args:
        value: the difference that was measured.
        ours: the figure of one model in each resample, float64 [resamples].
        theirs: the same figure of the other model in the same resamples.
    """
    return _clear({"value": value, **percentiles(ours - theirs)})


def over_seeds_and_queries(values: Sequence[float], resampled: Floats, seed: int) -> dict[str, Any]:
    """Return the mean difference over seeds with ``low``, ``high`` and ``clear``.

    Seeds and queries are resampled independently of each other (Owen 2007, the pigeonhole
    bootstrap), so the interval covers other seeds and other queries. With one seed it covers
    other queries alone.

    Args:
        values: the S differences that were measured, one for each seed.
        resampled: the same in each resample of queries, float64 [S, resamples]. A resample has
            the same queries for all seeds.
        seed: decides which seeds are drawn.
    """
    from scipy.special import ndtri, stdtrit

    seeds, resamples = resampled.shape
    center = resampled.mean(0)
    apart = resampled - center
    if seeds > 1:
        # Draws from S values vary by (S - 1) / S of what the values do, and a spread that is known
        # from a few seeds alone needs the wider quantiles of Student's t
        apart *= math.sqrt(seeds / (seeds - 1))
        apart *= stdtrit(seeds - 1, 1 - ALPHA / 2) / ndtri(1 - ALPHA / 2)
    drawn = np.random.default_rng(seed).integers(0, seeds, (seeds, resamples))
    means = center + np.take_along_axis(apart, drawn, axis=0).mean(0)
    return _clear({"value": fmean(values), **percentiles(means)})


def _clear(figure: dict[str, Any]) -> dict[str, Any]:
    """Add to a figure whether its interval leaves out 0; None without an interval."""
    low, high = figure["low"], figure["high"]
    return {**figure, "clear": None if low is None else bool(low > 0 or high < 0)}
