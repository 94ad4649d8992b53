"""Shows figures as tables in a terminal."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from clipft.cli.plain_table import PLAIN_STYLE, FigureTable
from clipft.core.common import counted
from clipft.metrics import figures
from clipft.metrics.figures import (
    GENERAL_SET,
    RECALL_DEFINITION,
    RECALL_NAME,
    Unit,
    figure_name,
    unit_of,
)
from clipft.tune.space import described

# "->" instead of the pages' arrow: not every terminal's font and encoding has the arrow
_LABELS = {key: label.replace("→", "->") for key, label in figures.ALL_DIRECTIONS.items()}
DIRECTIONS = {key: _LABELS[key] for key in figures.DIRECTIONS}
"""The two directions of retrieval in their order: JSON key -> label."""

UNCLEAR = "Differences are in points; ~ may be due to chance (the interval includes 0)."
UNCLEAR_AMONG_SEVERAL = (
    "Differences are in points; ~ may be due to chance (Holm's method, several comparisons)."
)

Json = Mapping[str, Any]

_GROUPED = frozenset(
    ("hit@1", "hit@5", "hit@10", "recall@10", "mrr", "map", "ndcg@10", "r_precision")
)
"""The grouped figures shown; the JSON has more."""
_HEADINGS = {**DIRECTIONS, "general": GENERAL_SET}
"""First part of a row's key -> the heading above the row."""


def value(number: float | None, unit: Unit = "percent", sign: str = "") -> str:
    """Format a figure in its unit: percent, a rank, or a decimal between 0 and 1.

    With ``sign`` ``"+"`` it is a difference, and that of percentages is in points.
    """
    shown = figures.number(number, unit, sign)
    return f"{shown}%" if number is not None and unit == "percent" and not sign else shown


def with_interval(figure: Json, unit: Unit = "percent", sign: str = "") -> str:
    """Format a figure and its interval, ``16.2% [11.3, 21.0]``; without one, the value alone."""
    shown = value(figure["value"], unit, sign)
    if figure.get("low") is None:
        return shown
    low, high = (value(figure[end], unit, sign).rstrip("%") for end in ("low", "high"))
    return f"{shown} [{low}, {high}]"


def signed(difference: Json, unit: Unit = "percent") -> str:
    """Format a difference with its interval, followed by ``~`` where that includes 0."""
    # Two spaces where there is no mark keep the right-aligned numbers below each other
    mark = " ~" if difference.get("clear") is False else "  "
    return f"{with_interval(difference, unit, '+')}{mark}"


def main_table(title: str, rows: Sequence[Json], model: str = "pretrained") -> Table:
    """Show the figures that matter most, of one model or of two and their difference.

    Args:
        title: what was measured, and on how many pairs.
        rows: from ``figures.main_rows``.
        model: the heading of the first model, the only one if nothing was fine-tuned.
    """
    tuned = ["fine-tuned", "difference"] if any(row["after"] for row in rows) else []
    table = FigureTable(title, "figure", model, *tuned)
    heading = ""
    for row in rows:
        part, _, name = row["key"].rpartition("/")
        label = RECALL_NAME if name == "mean_recall" else figure_name(name)
        if part and not tuned:
            label = f"{_HEADINGS[part]} {label}"
        elif part:  # beside three columns, there is no room for long labels
            label = f"  {label}"
            if part != heading:
                heading = part
                table.add_row(Text(_HEADINGS[part], style="bold"))
        cells = [with_interval(row["before"], row["unit"])]
        if tuned:
            cells.append(with_interval(row["after"], row["unit"]))
            cells.append(signed(row["change"], row["unit"]))
        table.add_row(label, *cells)
    return table


def comparison_tables(
    title: str, compared: dict[str, Any], model: str = "pretrained"
) -> Iterator[Table]:
    """Make one table for each protocol of ``Comparison.to_dict``.

    ``model`` is the heading of the first model, the only one when nothing was fine-tuned.
    """
    before, after = compared["before"], compared["after"]
    tuned = ["fine-tuned", "difference"] if after else []
    for protocol in (name for name in figures.PROTOCOLS if name in before):
        paired = protocol == "paired"
        table = FigureTable(
            f"{title}, {protocol}: {figures.protocol_size(before, protocol)}",
            *("figure", model, *tuned, *(["upper bound"] if paired else [])),
            caption=compared["definitions"][protocol]["protocol"],
        )
        for direction, _ in figures.directions_of(before[protocol]):
            table.add_row(Text(_LABELS[direction], style="bold"))
            part = before[protocol][direction]
            for name in _shown(protocol, part["figures"]):
                unit = unit_of(name)
                row = [f"  {figure_name(name)}", with_interval(part["figures"][name], unit)]
                if after:
                    row.append(with_interval(after[protocol][direction]["figures"][name], unit))
                    row.append(signed(compared["difference"][protocol][direction][name], unit))
                if paired:
                    row.append(value(part["ceiling"][name], unit))
                table.add_row(*row)
        yield table


def _shown(protocol: str, names: dict[str, Any]) -> list[str]:
    return [name for name in names if protocol != "grouped" or name in _GROUPED]


def accuracy_table(compared: dict[str, Any]) -> Table | None:
    """Show the accuracy of a model that is trained on labels, beside that of other classifiers."""
    found = compared.get("classification")
    if not found:
        return None
    tuned = ["fine-tuned", "difference"] if found["after"] else []
    title = f"Accuracy by {found['field']}: {figures.accuracy_size(found)}"
    table = FigureTable(title, "compared with", "accuracy", *tuned)
    for name, figure in found["before"].items():
        row = [figures.CLASSIFIERS[name], with_interval(figure)]
        if tuned:
            row += [with_interval(found["after"]), signed(found["difference"][name])]
        table.add_row(*row)
    return table


def category_table(compared: dict[str, Any]) -> Table | None:
    """Show R@10 from text to image for each category; None where pairs have no category."""
    categories = compared["before"]["by_category"]
    if not categories:
        return None
    tuned = ["fine-tuned", "difference"] if compared["after"] else []
    table = FigureTable(
        "By category, paired text -> image R@10", "category", "pairs", "pretrained", *tuned
    )
    for name, category in categories.items():
        # Categories are the user's own text: Text keeps rich from reading markup in it
        row: list[Any] = [Text(name), f"{category['pairs']:,}"]
        for model in ("before", "after") if tuned else ("before",):
            found = compared[model]["by_category"][name]["paired"]["text_to_image"]["figures"]
            row.append(with_interval(found["r@10"]))
        if tuned:
            change = compared["difference"]["by_category"][name]["paired"]["text_to_image"]
            row.append(signed(change["r@10"]))
        table.add_row(*row)
    return table


def dimensions_table(compared: dict[str, Any]) -> Table | None:
    """Show the figures of embeddings that are cut off; None without ``--matryoshka``."""
    sizes = compared["before"].get("by_dimensions")
    if not sizes:
        return None
    models = ["before", "after"] if compared["after"] else ["before"]
    titles = ["pretrained", "fine-tuned"][: len(models)]
    table = FigureTable("Mean recall by number of dimensions", "dimensions", *titles)
    for size in sizes:
        found = [compared[model]["by_dimensions"][size]["recall"] for model in models]
        table.add_row(size, *map(value, found))
    return table


def definitions(compared: dict[str, Any]) -> Table:
    """Explain every figure shown; ``compared`` is ``Comparison.to_dict``."""
    table = FigureTable("Definitions", "figure")
    table.add_column("", ratio=1)
    words = compared["definitions"]
    table.add_row("mean recall", RECALL_DEFINITION.split(": ", 1)[1])
    for protocol in (name for name in figures.PROTOCOLS if name in compared["before"]):
        for name in _shown(protocol, words[protocol]):
            if name != "protocol":
                table.add_row(f"{protocol} {figure_name(name)}", words[protocol][name])
    table.add_row("ties", words["ties"])
    table.add_row(Text("[low, high]"), words["interval"])
    return table


def sweep_table(points: list[dict[str, Any]], best: float, runs: Sequence[Json] = ()) -> Table:
    """Show mean recall at each point between the pretrained and the fine-tuned weights, and that
    of other ``runs``."""
    keep = any(point["keep"] for point in points)
    general = [f"{RECALL_NAME}, {GENERAL_SET}", "difference"] if keep else []
    table = FigureTable(
        "Between the pretrained (0) and the fine-tuned (1) weights",
        *("alpha", RECALL_NAME, "difference", *general),
    )
    for point in (*points, *runs):
        name = f"{point['alpha']:g}" if "alpha" in point else point["name"]
        row = [value(point["recall"]), signed(point["gain"])]
        if keep:
            row.append(value(point["keep"]["recall"]))
            row.append(signed(point["keep"]["change"]))
        table.add_row(Text(name), *row, style="bold" if point.get("alpha") == best else None)
    return table


def classification_table(title: str, classified: dict[str, Any]) -> Table:
    """Show classification by prompts, beside the linear classifier where there is one."""
    size = f"{counted(classified['images'], 'image')}, {counted(classified['labels'], 'label')}"
    headings = [f"{counted(len(classified['templates']), 'prompt')} per label"]
    columns = [classified]
    if classified["linear"]:
        columns.append(classified["linear"])
        images = classified["linear"]["training_images"]
        headings.append(f"linear classifier, {counted(images, 'training image')}")
    table = FigureTable(f"{title}: {size}", "figure", *headings)
    top1 = [{"value": c["top1"], **c.get("top1_interval", {})} for c in columns]
    table.add_row("top-1", *map(with_interval, top1))
    table.add_row("top-5", *(value(column["top5"]) for column in columns))
    recalls = (value(column["mean_per_class_recall"]) for column in columns)
    table.add_row("mean per-class recall", *recalls)
    return table


def confused_table(confused: list[dict[str, Any]]) -> Table:
    """Show the labels that the prompts confuse most often."""
    table = FigureTable("Most frequent confusions", "label")
    table.add_column("classified as")
    for heading in ("images", "of the label's images"):
        table.add_column(heading, justify="right")
    for pair in confused:
        row = (pair["label"], pair["taken_for"], f"{pair['images']:,}", f"{pair['share']:.0%}")
        table.add_row(*map(Text, row))
    return table


def variants_table(variants: Sequence[Json], most: int | None = None) -> Table:
    """Show the variants of an ablation, at most ``most`` of them.

    Args:
        variants: those of the ablation's report.json, the best first.
        most: None shows all.
    """
    shown = variants[:most]
    hidden = len(variants) - len(shown)
    seeds = max(variant["runs"] for variant in variants)
    table = FigureTable(
        f"Validation, {counted(len(variants), 'variant')}, {counted(seeds, 'seed')}: mean recall, "
        "and differences in it",
        *("variant", RECALL_NAME, "to pretrained", "to the best"),
        caption=f"{counted(hidden, 'more variant')}: --all" if hidden else "",
    )
    for variant in shown:
        cells = [""] * 3
        if variant["finished"]:
            cells[0] = with_interval(figures.as_figure(variant["mean_recall"]))
            if variant["trains"]:
                cells[1] = signed(figures.as_figure(variant["gain"]))
            if variant["to_best"]:
                cells[2] = signed(figures.as_figure(variant["to_best"]))
        else:
            cells[0] = "failed" if variant["failed"] else "not run yet"
        table.add_row(Text(variant["name"]), *cells)
    return table


def trials_heading(trials: Sequence[Json]) -> str:
    """Say how the trials of a search ended; it is wider than their table may be."""
    states = Counter(trial["state"] for trial in trials)
    words = {"finished": "finished", "pruned": "stopped early", "failed": "failed"}
    ended = ", ".join(f"{states[state]} {word}" for state, word in words.items() if states[state])
    return f"\nValidation: {counted(len(trials), 'trial')}, {ended}"


def trials_table(trials: Sequence[Json], most: int | None = None) -> Table:
    """Show the trials of a search with what they change, a line for each.

    Args:
        trials: those of tune.json, the best first.
        most: None shows all, each with everything that it changes.
    """
    shown = trials[:most]
    table = Table(**PLAIN_STYLE)
    for heading in ("trial", RECALL_NAME, "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("changes")
    for trial in shown:
        ran, planned = trial["epochs_run"], trial["epochs"]
        epochs = str(ran or 0) if ran == planned else f"{ran or 0} of {planned}"
        changes = trial["error"] or described(trial["changes"])
        recall = value(trial["recall"]) if trial["state"] != "failed" else "failed"
        # The column may shrink, but without --all each trial keeps to one line
        shown_changes = Text(changes, no_wrap=most is not None, overflow="ellipsis")
        table.add_row(str(trial["number"]), recall, epochs, shown_changes)
    return table
