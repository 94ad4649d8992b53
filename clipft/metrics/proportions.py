"""The interval of a share of yes-or-no outcomes, and the sign test of wins against losses."""

from math import comb, sqrt

_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share, in 0..1 (Wilson 1927). Without trials it is all of 0..1.

    Unlike the usual ``p ± 1.96 s``, it holds for a handful of trials, and near 0 and 1.
    """
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z * _Z
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of ``wins`` against ``losses`` if both were equally likely.

    It is exact (Dixon and Mood 1946); ties are left out.
    """
    trials = wins + losses
    tail = sum(comb(trials, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / (1 << trials)))
