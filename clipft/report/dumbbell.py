"""Draws figures before and after training on one axis, as two dots that a line joins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.metrics.figures import number

Json = Mapping[str, Any]

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Distances between the ticks of an axis of shares."""
_TICKS = 5


@dataclass(frozen=True)
class Mark:
    """A figure and its place on the axis. Places are percentages of the axis's length."""

    text: str
    at: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A difference with its interval. ``direction`` is "better" or "worse" if the interval does not
    include 0."""

    text: str = ""
    interval: str = ""
    direction: str = ""


@dataclass(frozen=True)
class DumbbellRow:
    """A figure before and after training. ``after`` is None if no model was fine-tuned."""

    name: str
    before: Mark
    after: Mark | None
    differences: Sequence[Difference]


@dataclass(frozen=True)
class Dumbbell:
    """Shares on one axis that begins at 0.

    ``columns`` are the headings of the differences, and ``label`` is the heading of the names.
    ``ticks`` are labels with their places, in percent of the axis's length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[DumbbellRow]
    ticks: Sequence[tuple[str, float]]
    label: str = "figure"

    @property
    def trained(self) -> bool:
        """True if a figure was measured after training too."""
        return any(row.after for row in self.rows)


def dumbbell(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Json, Json | None, Sequence[Any]]]
) -> Dumbbell:
    """Place ``rows`` on an axis that is long enough for all of them.

    Args:
        title: the title.
        columns: headings of the differences.
        rows: a name, the figure before and after training, and a difference (or None) for each
            of ``columns``.
    """
    shown = [figure for _, before, after, _ in rows for figure in (before, after) if figure]
    step, end = axis(max(figure.get("high") or figure["value"] for figure in shown))
    count = round(end / step)
    ticks = [(f"{100 * step * n:.0f}%", 100 * n / count) for n in range(count + 1)]

    def mark(figure: Json) -> Mark:
        places = (figure["value"], figure.get("low"), figure.get("high"))
        at, low, high = (None if place is None else 100 * place / end for place in places)
        return Mark(f"{number(figure['value'], 'percent')}%", at or 0.0, low, high)

    return Dumbbell(
        title,
        columns,
        [
            DumbbellRow(name, mark(before), mark(after) if after else None, [*map(_said, changes)])
            for name, before, after, changes in rows
        ],
        ticks,
    )


def axis(largest: float) -> tuple[float, float]:
    """Return the distance between ticks and the end of an axis from 0 to ``largest``, a share."""
    step = next((s for s in _STEPS if largest <= s * _TICKS + 1e-9), _STEPS[-1])
    return step, step * max(1, math.ceil(largest / step - 1e-9))


def _said(change: Json | None) -> Difference:
    if not change:
        return Difference()
    shown = number(change["value"], "percent", "+")
    if change.get("low") is None:
        return Difference(shown)
    low, high = (number(change[end], "percent", "+") for end in ("low", "high"))
    direction = ("better" if change["value"] > 0 else "worse") if change["clear"] else ""
    return Difference(shown, f"{low} to {high}", direction)
