"""An ablation for people: its table on the terminal's width, and its page."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from clipft.core.common import duration
from clipft.metrics.figures import (
    DIRECTIONS,
    NOTHING,
    RECALL_DEFINITION,
    figure_name,
    shown_bytes,
)
from clipft.report.charts import Chart, Series, chart_figures, chart_scripts
from clipft.report.html import PageTable, document, paragraph, section, table
from clipft.report.report import write_page_and_json
from clipft.report.run_page import environment_section, settings_tables

EXPLANATION = (
    f"{RECALL_DEFINITION}; figures in %, of each run's best epoch: mean ± standard deviation "
    "over the seeds. Gain: over the untouched model as the same run measured it, in points. "
    "Told apart: the 95 % interval of the paired differences over the seeds (Student's t) lies "
    "above zero. Grouped R@10: of all photos that have a caption (and the other way round), the "
    "share among the first 10. The spread is that of seeds alone: other validation pairs would "
    "change the figures too. Time: from the first batch on, mean of the runs. Memory: the highest."
)


FIGURES = ("runs", "mean recall", "gain", "text→image R@10", "image→text R@10")
COSTS = ("parameters", "time", "memory")
"""Columns that a terminal has room for, in two tables."""


def ablation_table(content: Mapping[str, Any]) -> PageTable:
    """The best variant first; figures that no variant has are left out."""
    variants = _ranked(content)
    cells = [_cells(variant) for variant in variants]
    columns = [name for name in cells[0] if any(row[name] != NOTHING for row in cells)]
    rows = [
        [variant["name"], *(row[name] for name in columns)]
        for variant, row in zip(variants, cells, strict=True)
    ]
    return PageTable("The best first", columns, rows, best=frozenset({0}))


def ablation_rows(content: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """A label and a cell for each of ``columns``; the best variant first."""
    return [[v["name"], *map(_cells(v).__getitem__, columns)] for v in _ranked(content)]


def _ranked(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(content["variants"], key=lambda v: -(v["mean_recall"]["mean"] or 0.0))


def _cells(variant: Mapping[str, Any]) -> dict[str, str]:
    """By column."""
    runs = f"{variant['finished']}/{variant['runs']}"
    if variant["failed"]:
        runs += f", {variant['failed']} failed"
    recalls = {
        f"{label.replace(' ', '')} {figure_name(name)}": _amount(
            variant["figures"][direction][name]
        )
        for direction, label in DIRECTIONS.items()
        for name in ("r@1", "r@10")
    }
    grouped = {
        f"grouped {label.replace(' ', '')} R@10": _amount((variant["grouped"] or {}).get(direction))
        for direction, label in DIRECTIONS.items()
    }
    parameters, seconds = variant["trainable_parameters"], variant["seconds"]["mean"]
    return {
        "runs": runs,
        "mean recall": _amount(variant["mean_recall"]),
        "gain": _amount(variant["gain"], "+") if variant["trains"] else NOTHING,
        **recalls,
        **grouped,
        "parameters": NOTHING if parameters is None else f"{parameters:,}",
        "time": NOTHING if seconds is None else duration(seconds),
        "memory": shown_bytes(variant["peak_memory_bytes"]),
    }


def _amount(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if not found or found["mean"] is None:
        return NOTHING
    spread = f" ± {100 * found['sd']:.1f}" if found["sd"] is not None else ""
    return f"{100 * found['mean']:{sign}.1f}{spread}"


def ablation_page(content: Mapping[str, Any]) -> str:
    """The page; the runs' own reports are linked where they lie."""
    charts = _charts(content)
    parts = [
        "" if content["finished"] else paragraph("Not all runs have finished.", "warning"),
        paragraph(content["verdict"], "verdict"),
        section(
            "Variants",
            table(ablation_table(content)),
            paragraph(EXPLANATION, "remark"),
        ),
        section("Compared", chart_figures(charts)),
        section("Failed runs", _failures(content)),
        section("Runs", _runs(content)),
        section("Settings in common", *settings_tables(content["settings"])),
        environment_section(content["environment"]),
    ]
    return document(content["title"], parts, chart_scripts() if charts else "")


def _charts(content: Mapping[str, Any]) -> list[Chart]:
    variants = [variant for variant in _ranked(content) if variant["finished"]]
    if not variants:
        return []
    means = [variant["mean_recall"] for variant in variants]
    reach = [
        (m["mean"] - m["sd"], m["mean"] + m["sd"]) if m["sd"] is not None else None for m in means
    ]
    bars = Series("mean recall", values=[m["mean"] for m in means], intervals=reach)
    names = [variant["name"] for variant in variants]
    trained = [variant for variant in variants if len(variant["curve"]) > 1]
    courses = [
        Series(variant["name"], variant["curve"], colour=1 + at % 7, dash=at // 7)
        for at, variant in enumerate(trained)
    ]
    cost = [
        Series(
            variant["name"],
            [(variant["trainable_parameters"], variant["mean_recall"]["mean"])],
            intervals=[found],
            colour=1 + at % 7,
        )
        for at, (variant, found) in enumerate(zip(variants, reach, strict=True))
        if variant["trainable_parameters"]
    ]
    charts = [
        Chart(
            "Mean recall",
            "bars",
            [bars],
            y="mean recall",
            labels=names,
            percent=True,
            note="Lines: one standard deviation over the seeds to either side.",
        )
    ]
    if courses:
        charts.append(
            Chart(
                "Mean recall by epoch",
                "lines",
                courses,
                "epoch",
                "mean recall",
                percent=True,
                zero=False,
                note="Mean over the seeds that came so far; epoch 0 is untouched.",
            )
        )
    if len({series.points[0][0] for series in cost}) > 1:
        charts.append(
            Chart(
                "What parameters buy",
                "points",
                cost,
                "parameters that learn",
                "mean recall",
                percent=True,
                log=True,
                zero=False,
            )
        )
    return charts


def _failures(content: Mapping[str, Any]) -> str:
    failed = [run for run in content["runs"] if run["state"] == "failed"]
    rows = [
        [_name(run), str(run["exit_code"]), run["error"] or "", run["hint"] or ""] for run in failed
    ]
    columns = ["exit code", "error", "hint"]
    found = PageTable(
        "Tried again when the ablation is run again", columns, rows, texts=frozenset({1, 2})
    )
    return table(found) if rows else ""


def _runs(content: Mapping[str, Any]) -> str:
    """Each run with a link to its own report."""
    items = []
    for run in content["runs"]:
        if run["state"] != "finished":
            items.append(f"<li>{escape(_name(run))}: {escape(run['state'])}</li>\n")
            continue
        link = escape(f"{run['folder']}/report.html")
        best = f"best epoch {run['best_epoch']}" if run["best_epoch"] else "untouched"
        took = f", {duration(run['seconds'])}" if run["seconds"] is not None else ""
        items.append(f'<li><a href="{link}">{escape(_name(run))}</a>: {best}{took}</li>\n')
    return f"<ul>\n{''.join(items)}</ul>\n"


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['variant']}, seed {run['seed']}"


def write_ablation_report(folder: Path, page: Path) -> dict[str, Any]:
    """Write ``page`` and its content as JSON beside it; returns the content.

    Raises:
        UsageError: no ablation is there.
        StorageError: the page cannot be written.
    """
    from clipft.ablation.runner import read_state
    from clipft.ablation.summary import ablation_content

    content = ablation_content(str(folder), read_state(folder))
    write_page_and_json(page, ablation_page(content), content)
    return content
