"""Evaluations as charts: by category, and on the way from the untouched to the tuned weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.report.charts import Chart, Interval, Series

_CATEGORIES = 20

Json = Mapping[str, Any]


def category_charts(categories: Sequence[Json]) -> list[Chart]:
    """R@10 of the largest categories; none where the pairs have no labels."""
    largest = categories[:_CATEGORIES]
    if not largest:
        return []
    bars = []
    for kind, name, colour in (("before", "untouched", 0), ("after", "tuned", 1)):
        figures = [category[kind] for category in largest]
        if any(figures):
            values = [figure["value"] if figure else None for figure in figures]
            bars.append(Series(name, values=values, intervals=_ends(figures), colour=colour))
    more = len(categories) - len(largest)
    note = "Lines: 95 % intervals; in brackets the pairs."
    if more:
        note += f" {more} smaller categories are in the JSON."
    labels = [f"{category['name']} ({category['pairs']:,})" for category in largest]
    title = "Text → image R@10 by category"
    return [Chart(title, "bars", bars, y="R@10", labels=labels, percent=True, note=note)]


def interpolation_charts(found: Json | None) -> list[Chart]:
    """Gain over the weights' way, and against what is kept on general pairs where measured.

    ``found`` is interpolation.json: ``points`` with ``alpha``, ``gain`` and ``keep``.
    """
    if not found or not found["points"]:
        return []
    points = found["points"]
    kept = [point for point in points if point["keep"]]
    courses = [_course("on these pairs", [(p["alpha"], p["gain"]) for p in points], 1)]
    if kept:
        general = [(p["alpha"], p["keep"]["change"]) for p in kept]
        courses.append(_course("on the general pairs", general, 2))
    note = f"0: untouched, 1: tuned; the most gain without a clear loss at {found['best']:g}."
    charts = [
        Chart(
            "Change in mean recall along the way",
            *("lines", courses, "share of the tuned weights", "change in mean recall"),
            percent=True,
            note=note,
        )
    ]
    if kept:
        way = [
            [p["keep"]["change"]["value"], p["gain"]["value"], f"at {p['alpha']:g}"] for p in kept
        ]
        charts.append(
            Chart(
                "Gain against kept ability",
                *("path", [Series("", way)], "change on the general pairs", "gain"),
                percent=True,
                percent_x=True,
                note="Each point is a share of the tuned weights; up and to the right is better.",
            )
        )
    return charts


def _course(name: str, points: Sequence[tuple[float, Json]], colour: int) -> Series:
    values = [(alpha, change["value"]) for alpha, change in points]
    return Series(name, values, intervals=_ends([c for _, c in points]), colour=colour)


def _ends(figures: Sequence[Json | None]) -> list[Interval]:
    return [
        (figure["low"], figure["high"]) if figure and figure.get("low") is not None else None
        for figure in figures
    ]
