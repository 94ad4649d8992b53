"""Mean and spread over seeds, and which differences they bear out."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t, 97.5 %, from 1 degree of freedom on; beyond it the normal's 1.96."""

Values = Mapping[int, float]
"""By seed."""


def spread(values: Values) -> dict[str, Any]:
    """Mean, sample standard deviation (None of a single value), and the values themselves."""
    several = len(values) > 1
    return {
        "mean": fmean(values.values()) if values else None,
        "sd": stdev(values.values()) if several else None,
        "values": {str(seed): value for seed, value in values.items()},
    }


def interval(values: Values) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None of fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    reach = t * stdev(values.values()) / math.sqrt(count)
    mean = fmean(values.values())
    return mean - reach, mean + reach


def differences(one: Values, other: Values) -> dict[int, float]:
    """``one`` minus ``other``, seed by seed, over the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}
