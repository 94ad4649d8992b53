"""The first screen of a run's report: its main figures on one axis, and some cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.metrics.figures import number

Json = Mapping[str, Any]

_MAIN = (
    "mean_recall",
    "text_to_image/r@1",
    "text_to_image/r@10",
    "image_to_text/r@1",
    "image_to_text/r@10",
)
_TICKS = 4
_GAINS, _CASES = 4, 6
"""Cases of the first screen: at most so many gains, and losses as far as there are any."""


@dataclass(frozen=True)
class Mark:
    """A figure and where it is on the axis. Places are percentages of the axis's length."""

    text: str
    at: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DumbbellRow:
    """A figure before and after training. ``after`` is None if no model was fine-tuned.

    ``direction`` is "better" or "worse" where the interval of the change does not include 0.
    """

    name: str
    before: Mark
    after: Mark | None
    change: str = ""
    interval: str = ""
    direction: str = ""


@dataclass(frozen=True)
class Dumbbell:
    """The main figures, all of them shares, on one axis that begins at 0.

    ``ticks`` are labels with their places, in percent of the axis's length.
    """

    title: str
    rows: Sequence[DumbbellRow]
    ticks: Sequence[tuple[str, float]]


def main_figures(tables: Sequence[Json], kept: Json | None) -> Dumbbell | None:
    """Draw the main figures of report.json: ``figures``, and mean recall of ``kept``.

    Returns None if nothing has been measured yet.
    """
    if not tables:
        return None
    found = {row["key"]: row for row in tables[0]["rows"]}
    rows = [(found[key]["name"], found[key]) for key in _MAIN if key in found]
    if kept:
        general = next(row for row in kept["figures"][0]["rows"] if row["key"] == "mean_recall")
        rows.append(("mean recall on the general pairs", general))
    figures = [row[when] for _, row in rows for when in ("before", "after") if row[when]]
    ends = [figure.get("high") or figure["value"] for figure in figures]
    top = min(1.0, max(0.1, math.ceil(10 * max(ends)) / 10))
    ticks = [(f"{100 * top * i / _TICKS:g} %", 100 * i / _TICKS) for i in range(_TICKS + 1)]
    return Dumbbell(tables[0]["title"], [_row(name, row, top) for name, row in rows], ticks)


def _row(name: str, row: Json, top: float) -> DumbbellRow:
    def mark(figure: Json) -> Mark:
        places = [figure["value"], figure.get("low"), figure.get("high")]
        at, low, high = (None if p is None else 100 * p / top for p in places)
        assert at is not None
        return Mark(f"{number(figure['value'], 'percent')} %", at, low, high)

    change, interval, direction = row["change"], "", ""
    if not row["after"] or not change:
        return DumbbellRow(name, mark(row["before"]), None)
    if change.get("low") is not None:
        interval = f"{number(change['low'], 'percent')} to {number(change['high'], 'percent')}"
        direction = ("better" if change["value"] > 0 else "worse") if change["clear"] else ""
    shown = number(change["value"], "percent", "+")
    return DumbbellRow(name, mark(row["before"]), mark(row["after"]), shown, interval, direction)


def main_cases(gallery: Sequence[Json]) -> list[tuple[int, Json]]:
    """Choose the cases of the first screen, each with its number in the gallery.

    Losses are shown as well as gains, and unchanged queries where there are too few of both.
    """
    by_kind: dict[str, list[tuple[int, Json]]] = {}
    for number_, case in enumerate(gallery):
        if case["before"] and case["after"]:
            by_kind.setdefault(case["kind"], []).append((number_, case))
    gains, losses = by_kind.get("gain", []), by_kind.get("loss", [])
    others = [*by_kind.get("miss", []), *by_kind.get("any", [])]
    chosen = [*gains[:_GAINS], *losses[: _CASES - _GAINS]]
    spare = [*gains[_GAINS:], *losses[_CASES - _GAINS :], *others]
    return [*chosen, *spare][:_CASES]
