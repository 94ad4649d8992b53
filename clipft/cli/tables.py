"""Figures as Rich tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clipft.core.common import counted
from clipft.metrics.figures import (
    DIRECTIONS,
    RECALL_DEFINITION,
    RECALLS,
    figure_name,
    number,
    unit_of,
)

_PLAIN: dict[str, Any] = {
    "box": box.SIMPLE,
    "show_edge": False,
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}
_ANY = 10_000
"""Columns: as many as a table wants."""


class FigureTable(Table):
    """A plain table whose title and caption may be wider than it. Where the terminal is too
    narrow for ``15.4% [10.9, 19.6]``, all intervals stand below their values."""

    def __init__(self, title: str, caption: str = "") -> None:
        super().__init__(**_PLAIN)
        self._above, self._below = title, caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = Measurement.get(console, options.update(max_width=_ANY), self).maximum
        table = self if wanted <= options.max_width else self._with_intervals_below()
        yield Text(f"\n{self._above}", style="italic")
        yield from Table.__rich_console__(table, console, options)
        if self._below:
            yield Text(self._below, style="italic")

    def _with_intervals_below(self) -> Table:
        table = Table(**_PLAIN)
        for column in self.columns:
            table.add_column(column.header, justify=column.justify, overflow="fold")
        cells = zip(*(column.cells for column in self.columns), strict=True)
        for row, values in zip(self.rows, cells, strict=True):
            table.add_row(*map(_broken, values), style=row.style)
        return table


def _broken(cell: RenderableType) -> RenderableType:
    return cell.replace(" [", "\n[") if isinstance(cell, str) else cell


def retrieval_table(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Retrieval figures side by side: ``columns`` maps a heading to ``Retrieval.to_dict``."""
    pairs = next(iter(columns.values()))["pairs"]
    table = FigureTable(f"{title}: {counted(pairs, 'pair')}")
    table.add_column("figure")
    for heading in columns:
        table.add_column(heading, justify="right")
    for direction, label in DIRECTIONS.items():
        found = [figures[direction] for figures in columns.values()]
        table.add_row(Text(label.replace("→", "->"), style="bold"))
        for name in RECALLS:
            table.add_row(f"  {name.upper()}", *(f"{figures[name]:.1%}" for figures in found))
        table.add_row("  MRR", *(f"{figures['mrr']:.3f}" for figures in found))
        table.add_row("  median rank", *(f"{figures['median_rank']:g}" for figures in found))
    return table


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """``rows`` hold a label and a cell for each of ``columns``; nothing is cut off."""
    table = FigureTable(title)
    table.add_column("", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column.replace("→", " -> "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


_SHOWN = ("hit@1", "hit@5", "hit@10", "recall@10", "mrr", "map", "ndcg@10", "r_precision")
"""Of the grouped figures; the JSON has all."""
UNCLEAR = "~ the interval of this difference includes 0: it may be chance"


def headline(compared: dict[str, Any]) -> str:
    """The figure to look at first, of ``Comparison.to_dict``."""
    untouched = value("recall", compared["before"]["recall"])
    shown = f"{RECALL_DEFINITION}. {untouched} untouched"
    if not compared["after"]:
        return f"{shown}."
    change = signed("recall", compared["difference"]["recall"])
    return f"{shown}, {value('recall', compared['after']['recall'])} tuned, {change.rstrip()}."


def comparison_tables(
    title: str, compared: dict[str, Any], model: str = "untouched"
) -> Iterator[Table]:
    """A table per protocol of ``Comparison.to_dict``; ``model`` names the one of ``before``."""
    before, after = compared["before"], compared["after"]
    for protocol in ("paired", "grouped"):
        words = compared["definitions"][protocol]["protocol"]
        table = _table(f"{title}, {protocol}: {_size(before, protocol)}", "figure", words)
        table.add_column(model, justify="right")
        if after:
            table.add_column("tuned", justify="right")
            table.add_column("difference", justify="right")
        if protocol == "paired":
            table.add_column("upper bound", justify="right")
        for direction, label in DIRECTIONS.items():
            table.add_row(Text(label.replace("→", "->"), style="bold"))
            for row in _rows(compared, protocol, direction):
                table.add_row(*row)
        yield table


def _table(title: str, first: str, caption: str = "") -> Table:
    table = FigureTable(title, caption)
    table.add_column(first)
    return table


def _size(evaluation: dict[str, Any], protocol: str) -> str:
    if protocol == "paired":
        return counted(evaluation["pairs"], "pair")
    part = evaluation["grouped"]["text_to_image"]
    return f"{counted(part['queries'], 'caption')}, {counted(part['candidates'], 'photo')}"


def _rows(compared: dict[str, Any], protocol: str, direction: str) -> Iterator[list[str]]:
    before = compared["before"][protocol][direction]
    for name, figure in _shown(protocol, before["figures"]).items():
        row = [f"  {figure_name(name)}", with_interval(name, figure)]
        if compared["after"]:
            after = compared["after"][protocol][direction]["figures"][name]
            row.append(with_interval(name, after))
            row.append(signed(name, compared["difference"][protocol][direction][name]))
        if protocol == "paired":
            row.append(value(name, before["ceiling"][name]))
        yield row


def _shown(protocol: str, named: dict[str, Any]) -> dict[str, Any]:
    hidden = () if protocol == "paired" else set(named) - set(_SHOWN)
    return {name: of for name, of in named.items() if name not in hidden}


def value(name: str, figure: float | None, sign: str = "") -> str:
    """One number in its unit: percent (percentage points with a sign), a rank, a share of 1."""
    shown = number(figure, unit_of(name), sign)
    if figure is None or unit_of(name) != "percent":
        return shown
    return f"{shown}{' pp' if sign else '%'}"


def with_interval(name: str, figure: dict[str, Any], sign: str = "") -> str:
    """``16.2% [11.3, 21.0]``; the value alone where there is no interval."""
    shown = value(name, figure["value"], sign)
    if figure.get("low") is None:
        return shown
    low, high = (value(name, figure[end], sign).rstrip(" p%") for end in ("low", "high"))
    return f"{shown} [{low}, {high}]"


def signed(name: str, difference: dict[str, Any]) -> str:
    """A difference with its interval, marked where that includes 0."""
    mark = " ~" if difference.get("clear") is False else "  "
    return f"{with_interval(name, difference, '+')}{mark}"


def category_table(compared: dict[str, Any]) -> Table | None:
    """R@10 from text to image of each category; None where there is none."""
    before = compared["before"]["by_category"]
    if not before:
        return None
    table = _table("By category, paired text -> image R@10", "category")
    for heading in ("pairs", "untouched", *(["tuned", "difference"] if compared["after"] else [])):
        table.add_column(heading, justify="right")

    def figure(part: str, name: str) -> Any:
        found = compared[part]["by_category"][name]["paired"]["text_to_image"]
        return found["r@10"] if part == "difference" else found["figures"]["r@10"]

    for name, category in before.items():
        row: list[Any] = [
            Text(name),
            f"{category['pairs']:,}",
            with_interval("r@10", figure("before", name)),
        ]
        if compared["after"]:
            row.append(with_interval("r@10", figure("after", name)))
            row.append(signed("r@10", figure("difference", name)))
        table.add_row(*row)
    return table


def definitions(compared: dict[str, Any]) -> Table:
    """What every figure means."""
    table = _table("Definitions", "figure")
    table.add_column("", ratio=1)
    for protocol in ("paired", "grouped"):
        words = compared["definitions"][protocol]
        named = _shown(protocol, {name: words[name] for name in words if name != "protocol"})
        for name, text in named.items():
            table.add_row(f"{protocol} {figure_name(name)}", text)
    table.add_row("ties", compared["definitions"]["ties"])
    table.add_row(Text("[low, high]"), compared["definitions"]["interval"])
    return table


def sweep_table(points: list[dict[str, Any]], best: float) -> Table:
    """Mean recall at each point between the untouched and the tuned weights."""
    keep = any(point["keep"] for point in points)
    table = _table(
        "Between the untouched (0) and the tuned (1) weights",
        "alpha",
        "recall: mean of paired R@1, R@5 and R@10 of both directions",
    )
    for heading in ("recall here", "gain", *(["recall kept set", "change"] if keep else [])):
        table.add_column(heading, justify="right")
    for point in points:
        row = [f"{point['alpha']:g}", value("r", point["recall"]), signed("r", point["gain"])]
        if keep:
            row.append(value("r", point["keep"]["recall"]))
            row.append(signed("r", point["keep"]["change"]))
        table.add_row(*row, style="bold" if point["alpha"] == best else None)
    return table


def classification_table(title: str, classified: dict[str, Any]) -> Table:
    """Prompts beside the linear classifier, where there is one."""
    size = f"{counted(classified['images'], 'image')}, {counted(classified['labels'], 'label')}"
    table = _table(f"{title}: {size}", "figure")
    table.add_column(f"{counted(len(classified['templates']), 'prompt')} each", justify="right")
    columns = [classified]
    if classified["linear"]:
        linear = classified["linear"]
        table.add_column(f"linear, {counted(linear['training_images'], 'image')}", justify="right")
        columns.append(linear)
    top1 = [{"value": c["top1"], **c.get("top1_interval", {})} for c in columns]
    table.add_row("  top-1", *(with_interval("r", figure) for figure in top1))
    table.add_row("  top-5", *(value("r", column["top5"]) for column in columns))
    recalls = (value("r", column["mean_per_class_recall"]) for column in columns)
    table.add_row("  mean per-class recall", *recalls)
    return table


def confused_table(confused: list[dict[str, Any]]) -> Table:
    """The labels that prompts mix up most."""
    table = _table("Mixed up most by the prompts", "label")
    table.add_column("taken for")
    for heading in ("images", "of the label's"):
        table.add_column(heading, justify="right")
    for pair in confused:
        row = (pair["label"], pair["taken_for"], f"{pair['images']:,}", f"{pair['share']:.0%}")
        table.add_row(*map(Text, row))
    return table
