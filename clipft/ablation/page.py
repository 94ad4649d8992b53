"""An ablation for people: its tables for the terminal, and its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipft.ablation.runner import read_state
from clipft.ablation.summary import ablation_content
from clipft.core.common import duration
from clipft.metrics.figures import (
    DIRECTIONS,
    NOTHING,
    RECALL_DEFINITION,
    figure_name,
    shown_bytes,
)
from clipft.report.charts import Chart, Series
from clipft.report.html import PageTable, render, write_page_and_json
from clipft.report.run_page import environment_table, settings_tables

Json = Mapping[str, Any]

EXPLANATION = (
    f"{RECALL_DEFINITION}. Figures are in %, measured at each run's best epoch, and given as mean "
    "± standard deviation over the seeds. The gain is over the pretrained model as the same run "
    "measured it, in points. Two variants are statistically indistinguishable unless the 95 % "
    "interval of their paired differences over the seeds (Student's t) lies above zero. Grouped "
    "R@10 is the share of all images with a caption (or all captions of an image) that are among "
    "the first 10. The test recall is the mean recall on the test pairs, by which nothing is "
    "chosen. The spread covers the seeds alone; other validation pairs would change the figures "
    "too. Time is counted from the first batch, as the mean of the runs, and memory is the highest "
    "peak of any run."
)

FIGURES = ("runs", "mean recall", "gain", "test recall", "text→image R@10", "image→text R@10")
COSTS = ("parameters", "time", "memory")
"""Columns of the two tables that fit a terminal."""


def write_ablation_report(folder: Path, page: Path) -> dict[str, Any]:
    """Write the report of an ablation as ``page`` and as JSON beside it; return its content.

    Raises:
        UsageError: ``folder`` holds no ablation.
        StorageError: the page cannot be written.
    """
    content = ablation_content(str(folder), read_state(folder))
    write_page_and_json(page, ablation_page(content), content)
    return content


def ablation_page(content: Json) -> str:
    """Render the page, which links to the runs' own reports.

    Args:
        content: the content of report.json, from ``ablation_content``.
    """
    ranked = _ranked(content)
    cells = [_cells(variant) for variant in ranked]
    columns = [name for name in cells[0] if any(row[name] != NOTHING for row in cells)]
    failures = [
        [
            f"{run['variant']}, seed {run['seed']}",
            str(run["exit_code"]),
            run["error"] or "",
            run["hint"] or "",
        ]
        for run in content["runs"]
        if run["state"] == "failed"
    ]
    return render(
        "ablation.html",
        content=content,
        variants=PageTable(
            "The best variant first", columns, ablation_rows(content, columns), best=frozenset({0})
        ),
        explanation=EXPLANATION,
        charts=_charts([variant for variant in ranked if variant["finished"]]),
        failures=PageTable(
            "They are retried when the ablation is run again",
            ["exit code", "error", "hint"],
            failures,
            texts=frozenset({1, 2}),
        ),
        duration=duration,
        settings=settings_tables(content["settings"]),
        environment=environment_table(content["environment"]),
    )


def ablation_rows(content: Json, columns: Sequence[str]) -> list[list[str]]:
    """Return a label and a cell for each of ``columns``, the best variant first."""
    return [[v["name"], *map(_cells(v).__getitem__, columns)] for v in _ranked(content)]


def _ranked(content: Json) -> list[Json]:
    return sorted(content["variants"], key=lambda v: -(v["mean_recall"]["mean"] or 0.0))


def _cells(variant: Json) -> dict[str, str]:
    """The cells of a variant by the name of their column."""

    def amount(found: Json | None, sign: str = "") -> str:
        if not found or found["mean"] is None:
            return NOTHING
        spread = f" ± {100 * found['sd']:.1f}" if found["sd"] is not None else ""
        return f"{100 * found['mean']:{sign}.1f}{spread}"

    runs = f"{variant['finished']}/{variant['runs']}"
    if variant["failed"]:
        runs += f", {variant['failed']} failed"
    paired, grouped = {}, {}
    for direction, label in DIRECTIONS.items():
        short = label.replace(" ", "")
        for name in ("r@1", "r@10"):
            figures = variant["figures"][direction]
            paired[f"{short} {figure_name(name)}"] = amount(figures[name])
        grouped[f"grouped {short} R@10"] = amount((variant["grouped"] or {}).get(direction))
    parameters, seconds = variant["trainable_parameters"], variant["seconds"]["mean"]
    return {
        "runs": runs,
        "mean recall": amount(variant["mean_recall"]),
        "gain": amount(variant["gain"], "+") if variant["trains"] else NOTHING,
        "test recall": amount(variant["test_mean_recall"]),
        **paired,
        **grouped,
        "parameters": NOTHING if parameters is None else f"{parameters:,}",
        "time": NOTHING if seconds is None else duration(seconds),
        "memory": shown_bytes(variant["peak_memory_bytes"]),
    }


def _charts(variants: Sequence[Json]) -> list[Chart]:
    """Mean recall by variant, by epoch and by the number of trainable parameters."""
    if not variants:
        return []
    names = [variant["name"] for variant in variants]
    means = [variant["mean_recall"] for variant in variants]
    intervals = [
        None if m["sd"] is None else (m["mean"] - m["sd"], m["mean"] + m["sd"]) for m in means
    ]
    bars = Series("mean recall", values=[m["mean"] for m in means], intervals=intervals)
    note = "The lines are one standard deviation over the seeds to either side."
    title, y = "Mean recall", "mean recall"
    charts = [Chart(title, "bars", [bars], y=y, labels=names, percent=True, note=note)]

    # Colors 1 to 7 of the page in turn; beyond those the dashes differ
    curves = [
        Series(variant["name"], variant["curve"], color=1 + at % 7, dash=at // 7)
        for at, variant in enumerate(v for v in variants if len(v["curve"]) > 1)
    ]
    if curves:
        note = "The mean over the seeds that reached the epoch. Epoch 0 is the pretrained model."
        title = "Mean recall by epoch"
        charts.append(
            Chart(title, "lines", curves, "epoch", y, percent=True, zero=False, note=note)
        )

    costs = []
    for at, (variant, around) in enumerate(zip(variants, intervals, strict=True)):
        parameters = variant["trainable_parameters"]
        if parameters:
            point = (parameters, variant["mean_recall"]["mean"])
            costs.append(Series(variant["name"], [point], intervals=[around], color=1 + at % 7))
    if len({series.points[0][0] for series in costs}) > 1:
        title, x = "Mean recall against trainable parameters", "trainable parameters"
        charts.append(Chart(title, "points", costs, x, y, percent=True, log=True, zero=False))
    return charts
