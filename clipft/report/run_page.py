"""Renders the page of a run's report from its content and thumbnails."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clipft.core.common import duration
from clipft.metrics.figures import (
    GENERAL_SET,
    RECALL_DEFINITION,
    Unit,
    figure_name,
    number,
    shown_bytes,
)
from clipft.report.charts import category_charts, interpolation_charts, run_charts
from clipft.report.html import PageTable, data_uri, render
from clipft.report.overview import main_cases, main_figures

Json = Mapping[str, Any]

_FIRST = frozenset({0})
_MISTAKEN = 12
"""Most confusions that are shown. The JSON has all."""


def run_page(content: Json, images: Mapping[int, bytes]) -> str:
    """Render the page of a run.

    Args:
        content: the content of report.json.
        images: pair number -> JPEG, for the images of the gallery that could be decoded.
    """
    charts = {
        "Curves": run_charts(content["steps"], content["epochs"]),
        "By category": category_charts(content["categories"]),
        "Between pretrained and fine-tuned": interpolation_charts(content["interpolation"]),
    }
    kept = content["kept"]
    skipped = [
        [f"{pair.get('shard', '')}:{pair.get('key', '')}", str(pair.get("reason", ""))]
        for pair in content["skipped"]["listed"]
    ]
    mistaken = [
        [
            f"{m['category']} → {m['taken_for']}",
            f"{m['before']} of {m['queries']}",
            *([] if m["after"] is None else [f"{m['after']} of {m['queries']}"]),
        ]
        for m in content["mistaken"][:_MISTAKEN]
    ]
    models = ["pretrained", "fine-tuned"][: len(mistaken[0]) - 1] if mistaken else []
    lookup = content["lookup"]
    shown = {n for q in lookup["queries"] for n in (*q["before"], *q["after"])} if lookup else ()
    return render(
        "run.html",
        content=content,
        images=images,
        dumbbell=main_figures(content["figures"], kept),
        main_cases=main_cases(content["gallery"]),
        lookup_images={n: data_uri(images[n]) for n in sorted(shown) if n in images},
        mistaken=PageTable("Category of the caption, and of its first image", models, mistaken),
        command=train_command(content["settings"]),
        figures=[_figure_tables(found) for found in content["figures"]],
        # Tables need different titles, because screen readers list them by title
        kept=[
            _figure_tables({**found, "title": f"{GENERAL_SET.capitalize()}: {found['title']}"})
            for found in (kept["figures"] if kept else ())
        ],
        charts={title: found for title, found in charts.items() if found},
        skipped=PageTable("Pairs that could not be used", ["reason"], skipped, texts=_FIRST),
        settings=settings_tables(content["settings"]),
        facts=PageTable("Cost and setup", ["value"], _facts(content), texts=_FIRST),
        environment=environment_table(content["environment"]),
    )


def _figure_tables(found: Json) -> tuple[PageTable, PageTable]:
    """Return a table of figures, with their intervals and upper bounds if there are any, and a
    table of their definitions."""

    def cell(figure: Json | None, unit: Unit, sign: str = "") -> str:
        if figure is None or figure["value"] is None:
            return number(None, unit)
        # A difference of shares is in percentage points, so it has no percent sign
        percent = "%" if unit == "percent" and not sign else ""
        value = f"{number(figure['value'], unit, sign)}{percent}"
        if figure.get("low") is None:
            return value
        low, high = (number(figure[end], unit, sign) for end in ("low", "high"))
        return f"{value}\n{low} to {high}"

    rows = found["rows"]
    columns = {"pretrained": [cell(row["before"], row["unit"]) for row in rows]}
    if any(row["after"] for row in rows):
        columns["fine-tuned"] = [cell(row["after"], row["unit"]) for row in rows]
        columns["difference"] = [cell(row["change"], row["unit"], "+") for row in rows]
    if any(row["ceiling"] is not None for row in rows):
        columns["upper bound"] = [
            "" if row["ceiling"] is None else cell({"value": row["ceiling"]}, row["unit"])
            for row in rows
        ]
    title = found["title"]
    if any(row["before"].get("low") is not None for row in rows):
        title += ", with 95% intervals; differences in points"
    names = [row["name"] for row in rows]
    lines = list(zip(names, *columns.values(), strict=True))
    words = [[figure_name(name), text] for name, text in found["definitions"].items()]
    if any(row["key"] == "mean_recall" for row in rows):
        words.insert(0, RECALL_DEFINITION.split(": ", 1))
    return (
        PageTable(title, list(columns), lines),
        PageTable(f"Definitions: {found['title']}", ["definition"], words, texts=_FIRST),
    )


def settings_tables(settings: Sequence[Json]) -> tuple[PageTable, PageTable]:
    """Return a table of the settings that were changed and one of the others."""

    def shown(value: Any) -> str:
        if value is None:
            return "none"
        if isinstance(value, bool):
            return "on" if value else "off"
        return f"{value:g}" if isinstance(value, float) else str(value)

    changed = [
        [s["name"], shown(s["value"]), shown(s["default"])] for s in settings if s["changed"]
    ]
    others = [[s["name"], shown(s["value"])] for s in settings if not s["changed"]]
    return (
        PageTable("Changed", ["value", "default"], changed, texts=frozenset({0, 1})),
        PageTable("At their defaults", ["value"], others, texts=_FIRST),
    )


def train_command(settings: Sequence[Json]) -> str:
    """Return the command that trains with the same settings, with one option on each line."""
    options = []
    for setting in settings:
        if not setting["changed"] or setting["name"] == "resume_from_checkpoint":
            continue
        option, value = setting["name"].replace("_", "-"), setting["value"]
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            words = value if isinstance(value, list) else [value]
            options += [f"--{option} {shlex.quote(str(word))}" for word in words]
    return " \\\n  ".join(["clipft train", *options])


def environment_table(environment: Mapping[str, str]) -> PageTable:
    """Return a table of software versions and the device."""
    rows = [list(entry) for entry in environment.items()]
    return PageTable("Versions and device", ["value"], rows, texts=_FIRST)


def _facts(content: Json) -> list[list[str]]:
    plan = content["plan"] or {}
    rows = [["folder", content["folder"]]]
    if plan:
        epochs, steps = plan["epochs"], plan["epochs"] * plan["steps_per_epoch"]
        pairs = f"{plan['train_pairs']:,} for training, {plan['val_pairs']:,} for validation"
        batch = plan["effective_batch_size"]
        rows += [
            ["trainable", plan["parameters"]],
            ["pairs", pairs],
            ["steps", f"{steps:,} of {batch:,} pairs in {epochs} epochs"],
            [
                "computation",
                f"{plan['device']}, {plan['precision']}, {plan['optimizer']}, "
                f"micro-batches of {plan['micro_batch_size']}",
            ],
            ["notes", "; ".join(plan["notes"]) or "-"],
        ]
    if content["seconds"] is not None:
        rows.append(["time", duration(content["seconds"])])
        if content["cost"] is not None:
            rows.append(
                ["cost", f"{content['cost']:,.2f}, for {content['device_hours']:.2g} hours"]
            )
        rows.append(["peak memory", shown_bytes(content["peak_memory_bytes"])])
    return rows
