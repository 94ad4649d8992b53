"""Renders an ablation as tables for the terminal and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipft.ablation.runner import read_state
from clipft.ablation.summary import ablation_content
from clipft.core.common import counted, duration
from clipft.metrics.figures import (
    DIRECTIONS,
    NOTHING,
    RECALL_DEFINITION,
    RECALL_NAME,
    as_figure,
    figure_name,
    shown_bytes,
)
from clipft.report.charts import Chart, Series
from clipft.report.dumbbell import Dumbbell, dumbbell
from clipft.report.html import PageTable, render, write_page_and_json
from clipft.report.run_page import environment_table, settings_tables

Json = Mapping[str, Any]

EXPLANATION = (
    f"{RECALL_DEFINITION}. It is measured on the validation pairs at each run's best epoch, and "
    "averaged over the seeds. Its difference to the pretrained model is the gain. Differences are "
    "taken seed by seed and given in percentage points; their 95% intervals (Student's t) cover "
    "the seeds alone, and other validation pairs would change the figures too. Of many variants, "
    "one often looks different by chance: a difference to the pretrained model, or to the best "
    "variant, is clear if the p-value of the paired t-test, "
    "adjusted by Holm's method for the number of variants, is below 0.05. Grouped R@10 is the "
    "share of all images with a caption (or all captions of an image) that are among the first 10. "
    "The test recall is the mean recall on the test pairs, which are not used to choose anything. "
    "Time is counted from the first batch, as the mean of the runs, and memory is the highest peak "
    "of any run."
)

FIGURES = ("runs", "mean recall", "gain", "test recall", "text→image R@10", "image→text R@10")
COSTS = ("parameters", "time", "memory")
"""Columns of the two tables that are narrow enough for a terminal."""


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
    """Render the page, which links to the reports of the runs.

    Args:
        content: the content of report.json, from ``ablation_content``.
    """
    variants = ranked(content)
    finished = [variant for variant in variants if variant["finished"]]
    cells = [_cells(variant) for variant in variants]
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
        dumbbell=_dumbbell(finished) if finished else None,
        variants=PageTable(
            "The best variant first", columns, ablation_rows(content, columns), best=frozenset({0})
        ),
        explanation=EXPLANATION,
        charts=_charts(finished),
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


def _dumbbell(variants: Sequence[Json]) -> Dumbbell:
    """Return mean recall of each variant and of its pretrained model, the best variant first."""
    rows = []
    for variant in variants:
        before, after = as_figure(variant["pretrained"]), as_figure(variant["mean_recall"])
        # The pretrained model does not depend on the seed, so it has no interval
        before = {"value": before["value"]}
        changes = [as_figure(variant["gain"]) if variant["trains"] else None]
        changes.append(as_figure(variant["to_best"]) if variant["to_best"] else None)
        rows.append((variant["name"], before, after if variant["trains"] else None, changes))
    seeds = counted(max(variant["finished"] for variant in variants), "seed")
    title = f"Mean recall on the validation pairs, mean over {seeds}"
    return replace(dumbbell(title, ["to pretrained", "to the best"], rows), label="variant")


def ablation_rows(content: Json, columns: Sequence[str]) -> list[list[str]]:
    """Return a label and a cell for each of ``columns``, the best variant first."""
    return [[v["name"], *map(_cells(v).__getitem__, columns)] for v in ranked(content)]


def ranked(content: Json) -> list[Json]:
    """Return the variants, the best first."""
    return sorted(content["variants"], key=lambda v: -(v["mean_recall"]["mean"] or 0.0))


def _cells(variant: Json) -> dict[str, str]:
    """Return the cells of a variant by the names of their columns."""

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
    """Return charts of mean recall over the epochs and over the number of trainable parameters."""
    charts = []
    y = RECALL_NAME
    # Colors 1 to 7 of the page are used in turn. Lines of the same color have different dashes
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
    for at, variant in enumerate(variants):
        parameters, recall = variant["trainable_parameters"], variant["mean_recall"]
        around = None if recall["low"] is None else (recall["low"], recall["high"])
        if parameters:
            point = (parameters, recall["mean"])
            costs.append(Series(variant["name"], [point], intervals=[around], color=1 + at % 7))
    if len({series.points[0][0] for series in costs}) > 1:
        title, x = "Mean recall against trainable parameters", "trainable parameters"
        note = "The lines are 95% intervals over the seeds."
        charts.append(
            Chart(title, "points", costs, x, y, percent=True, log=True, zero=False, note=note)
        )
    return charts
