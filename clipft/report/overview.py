"""Chooses the main figures and the cases for the first screen of a run's report."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.metrics.figures import main_rows
from clipft.report.dumbbell import Dumbbell, dumbbell

Json = Mapping[str, Any]

_GAINS, _CASES = 4, 6
"""Gains on the first screen if there are enough losses, and most cases in total."""


def main_figures(tables: Sequence[Json], kept: Json | None) -> Dumbbell | None:
    """Place the main figures of report.json that are shares on one axis.

    Args:
        tables: ``figures`` of report.json.
        kept: ``kept`` of report.json, whose mean recall is added.

    Returns:
        None if nothing has been measured yet.
    """
    if not tables:
        return None
    rows = main_rows(tables, kept["figures"] if kept else None)
    shares = [row for row in rows if row["unit"] == "percent"]
    return dumbbell(
        tables[0]["title"],
        ["difference"],
        [(row["name"], row["before"], row["after"], [row["change"]]) for row in shares],
    )


def main_cases(gallery: Sequence[Json]) -> list[tuple[int, Json]]:
    """Choose the cases for the first screen, each with its number in the gallery.

    Gains and losses are chosen first, and unchanged queries if there are too few of both.
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
