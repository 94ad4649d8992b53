"""The page of a run's report, drawn of its content and thumbnails alone."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clipft.core.common import duration
from clipft.metrics.figures import (
    RECALL_DEFINITION,
    figure_name,
    number,
    shown_bytes,
)
from clipft.report.charts import chart_figures, chart_scripts
from clipft.report.curves import category_charts, interpolation_charts, run_charts
from clipft.report.html import PageTable, document, folded, image, paragraph, section, table

_KINDS = {
    "gain": "Best gains",
    "loss": "Worst losses",
    "any": "Other queries, spread evenly",
}


def run_page(content: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    """``pictures`` holds the JPEG of each pair of the gallery that has one."""
    curves = run_charts(content["steps"], content["epochs"])
    categories = category_charts(content["categories"])
    ways = interpolation_charts(content["interpolation"])
    at = len(curves)
    parts = [
        "" if content["finished"] else paragraph("This run has not ended.", "warning"),
        paragraph(content["verdict"], "verdict"),
        section("Before and after", *map(_figures, content["figures"])),
        _kept(content["kept"]),
        section("Curves", chart_figures(curves)),
        section("By category", chart_figures(categories, at)),
        section("Between untouched and tuned", chart_figures(ways, at + len(categories))),
        _gallery(content, pictures),
        _skipped(content["skipped"]),
        section("Settings", *settings_tables(content["settings"])),
        section(
            "The run", table(PageTable("What it took", ["value"], _facts(content), texts=_TEXT))
        ),
        environment_section(content["environment"]),
    ]
    return document(
        content["title"], parts, chart_scripts() if curves or categories or ways else ""
    )


_TEXT = frozenset({0})


def _figures(found: Mapping[str, Any]) -> str:
    """Each with its interval below it, and a column of ceilings, where there are any."""
    rows = found["rows"]
    kinds = {"untouched": "before"}
    if any(row["after"] for row in rows):
        kinds |= {"tuned": "after", "change": "change"}
    columns = {title: [_cell(row, kind) for row in rows] for title, kind in kinds.items()}
    ceilings = [_ceiling(row) for row in rows]
    if any(ceilings):
        columns["upper bound"] = ceilings
    names = [row["name"] for row in rows]
    lines = list(map(list, zip(names, *columns.values(), strict=True)))
    title = found["title"]
    if any(row["before"].get("low") is not None for row in rows):
        title += ", with 95 % intervals"
    words = [[figure_name(name), text] for name, text in found["definitions"].items()]
    defined = table(PageTable(RECALL_DEFINITION, ["definition"], words, texts=_TEXT))
    shown_table = table(PageTable(title, list(columns), lines))
    return shown_table + folded("What these figures mean", defined)


def _cell(row: Mapping[str, Any], kind: str) -> str:
    figure, unit = row[kind], row["unit"]
    value = figure["value"] if figure else None
    text = number(value, unit, "+") if kind == "change" else _shown(value, unit)
    if not figure or figure.get("low") is None:
        return text
    return f"{text}\n{number(figure['low'], unit)} to {number(figure['high'], unit)}"


def _shown(value: float | None, unit: Any) -> str:
    return number(value, unit) + (" %" if unit == "percent" and value is not None else "")


def _ceiling(row: Mapping[str, Any]) -> str:
    return "" if row["ceiling"] is None else _shown(row["ceiling"], row["unit"])


def _kept(kept: Mapping[str, Any] | None) -> str:
    if not kept:
        return ""
    words = paragraph(f"What the model kept of its general ability, on {kept['keep_dir']}.")
    return section("Kept ability", words, *map(_figures, kept["figures"]))


def _gallery(content: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    parts = []
    if content["gallery_note"]:
        parts.append(paragraph(content["gallery_note"], "remark"))
    if content["gallery"]:
        parts.append(
            paragraph(
                "Each query is a caption; the first five photos are shown before and after "
                "training. Right are all photos of the same caption; ranks are of the first "
                "right one.",
                "remark",
            )
        )
    for kind, title in _KINDS.items():
        cases = [case for case in content["gallery"] if case["kind"] == kind]
        if cases:
            parts.append(f"<h3>{escape(title)}</h3>\n")
            shown = "".join(_case(case, pictures) for case in cases)
            parts.append(f'<div class="cases">\n{shown}</div>\n')
    return section("Gallery", *parts)


def _case(case: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    ranks = f"rank {case['rank_before']}"
    if case["rank_after"] is not None:
        ranks += f" before, {case['rank_after']} after"
    own = [] if _shows(case["own"], case) else [_picture(case["own"], pictures, "sought")]
    rows = [("untouched", case["before"]), ("tuned", case["after"])]
    shown_rows = "".join(
        _row(name, [_picture(hit, pictures, "right") for hit in hits])
        for name, hits in rows
        if hits
    )
    sought = _row("sought, not among them", own) if own else ""
    return (
        f'<article class="case">\n<p><b>{escape(case["query"])}</b><br>'
        f"<small>{escape(ranks)}</small></p>\n{shown_rows}{sought}</article>\n"
    )


def _row(name: str, figures: Sequence[str]) -> str:
    return paragraph(name, "remark") + f'<div class="group">\n{"".join(figures)}</div>\n'


def _shows(own: Mapping[str, Any], case: Mapping[str, Any]) -> bool:
    return any(hit["pair"] == own["pair"] for hit in (*case["before"], *case["after"]))


def _picture(hit: Mapping[str, Any], pictures: Mapping[int, bytes], mark: str) -> str:
    kind = ' class="right"' if hit["right"] else ""
    right = f'<span class="mark">✓ {mark}</span> ' if hit["right"] else ""
    shown_image = image(pictures.get(hit["pair"], b""), hit["place"])
    return (
        f'<figure{kind} title="{escape(hit["place"])}">{shown_image}'
        f"<figcaption>{right}{escape(hit['caption'])}</figcaption></figure>\n"
    )


def _skipped(skipped: Mapping[str, Any]) -> str:
    if not skipped["counts"]:
        return ""
    counts = ", ".join(f"{count:,} of {split}" for split, count in skipped["counts"].items())
    rows = [
        [f"{entry.get('shard', '')}:{entry.get('key', '')}", str(entry.get("reason", ""))]
        for entry in skipped["listed"]
    ]
    listed = table(PageTable("Pairs that could not be used", ["why"], rows, texts=_TEXT))
    return section("Skipped pairs", paragraph(f"Left out: {counts}."), listed)


def settings_tables(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Changed ones first; the others folded away."""
    changed = [
        [s["name"], _value(s["value"]), _value(s["default"])] for s in settings if s["changed"]
    ]
    others = [[s["name"], _value(s["value"])] for s in settings if not s["changed"]]
    both = frozenset({0, 1})
    parts = []
    if changed:
        parts.append(table(PageTable("Changed", ["value", "default"], changed, texts=both)))
    return [
        *parts,
        folded(
            "All others, at their defaults",
            table(PageTable("At their defaults", ["value"], others, texts=_TEXT)),
        ),
    ]


def environment_section(environment: Mapping[str, str]) -> str:
    if not environment:
        return ""
    rows = [list(entry) for entry in environment.items()]
    return section(
        "Environment", table(PageTable("Versions and device", ["value"], rows, texts=_TEXT))
    )


def _facts(content: Mapping[str, Any]) -> list[list[str]]:
    plan = content["plan"] or {}
    rows = [["folder", content["folder"]]]
    if plan:
        steps = plan["epochs"] * plan["steps_per_epoch"]
        rows += [
            ["learns", plan["parameters"]],
            ["pairs", f"{plan['train_pairs']:,} to train on, {plan['val_pairs']:,} to validate on"],
            [
                "steps",
                f"{steps:,} of {plan['effective_batch_size']:,} pairs in {plan['epochs']} epochs",
            ],
            [
                "computing",
                f"{plan['device']}, {plan['precision']}, {plan['optimizer']}, "
                f"micro-batches of {plan['micro_batch_size']}",
            ],
            ["notes", "; ".join(plan["notes"]) or "-"],
        ]
    if content["seconds"] is not None:
        rows.append(["time", duration(content["seconds"])])
        rows.append(["peak memory", shown_bytes(content["peak_memory_bytes"])])
    return rows


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
