"""Evaluation figures as tables for a terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clipft.core.common import counted
from clipft.metrics import figures
from clipft.metrics.figures import RECALL_DEFINITION, RECALLS, figure_name, unit_of

# "->" instead of the pages' arrow: not every terminal's font and encoding has the arrow
DIRECTIONS = {key: label.replace("→", "->") for key, label in figures.DIRECTIONS.items()}
"""The two directions of retrieval in their order: JSON key -> label."""

UNCLEAR = "~ the interval of this difference includes 0, so it may be due to chance"

_GROUPED = frozenset(
    ("hit@1", "hit@5", "hit@10", "recall@10", "mrr", "map", "ndcg@10", "r_precision")
)
"""The grouped figures shown; the JSON has more."""
_STYLE: dict[str, Any] = {
    "box": box.SIMPLE,
    "show_edge": False,
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}
_UNLIMITED = 10_000
"""More columns than any table needs."""


class FigureTable(Table):
    """A plain table with a title above and a caption below, which may both be wider than it.

    The first column is aligned left, the others right. Where the terminal is too narrow for
    cells such as ``15.4% [10.9, 19.6]``, all intervals move to a line below their values.
    """

    def __init__(self, title: str, *headings: str, caption: str = "") -> None:
        super().__init__(**_STYLE)
        # Not rich's own title and caption: those are wrapped at the width of the table
        self._above, self._below = title, caption
        for number, heading in enumerate(headings):
            self.add_column(heading, justify="right" if number else "left")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table: Table = self
        wanted = Measurement.get(console, options.update(max_width=_UNLIMITED), self).maximum
        if wanted > options.max_width:
            table = Table(**_STYLE)
            for column in self.columns:
                table.add_column(column.header, justify=column.justify, overflow="fold")
            cells = zip(*(column.cells for column in self.columns), strict=True)
            for row, values in zip(self.rows, cells, strict=True):
                broken = (v.replace(" [", "\n[") if isinstance(v, str) else v for v in values)
                table.add_row(*broken, style=row.style)
        yield Text(f"\n{self._above}", style="italic")
        yield from Table.__rich_console__(table, console, options)
        if self._below:
            yield Text(self._below, style="italic")


def value(name: str, number: float | None, sign: str = "") -> str:
    """Format a figure in its unit: percent, a rank, or a decimal between 0 and 1.

    With ``sign`` ``"+"`` it is a difference, and percent become percentage points.
    """
    shown = figures.number(number, unit_of(name), sign)
    if number is None or unit_of(name) != "percent":
        return shown
    return shown + (" pp" if sign else "%")


def with_interval(name: str, figure: dict[str, Any], sign: str = "") -> str:
    """Format a figure and its interval, ``16.2% [11.3, 21.0]``; without one, the value alone."""
    shown = value(name, figure["value"], sign)
    if figure.get("low") is None:
        return shown
    low, high = (value(name, figure[end], sign).rstrip(" p%") for end in ("low", "high"))
    return f"{shown} [{low}, {high}]"


def signed(name: str, difference: dict[str, Any]) -> str:
    """Format a difference with its interval, followed by ``~`` where that includes 0."""
    # Two spaces where there is no mark keep the right-aligned numbers below each other
    mark = " ~" if difference.get("clear") is False else "  "
    return f"{with_interval(name, difference, '+')}{mark}"


def retrieval_table(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Show retrieval figures side by side; ``columns`` maps a heading to ``Retrieval.to_dict``."""
    pairs = next(iter(columns.values()))["pairs"]
    table = FigureTable(f"{title}: {counted(pairs, 'pair')}", "figure", *columns)
    for direction, label in DIRECTIONS.items():
        table.add_row(Text(label, style="bold"))
        for name in (*RECALLS, "mrr", "median_rank"):
            cells = (value(name, found[direction][name]) for found in columns.values())
            table.add_row(f"  {figure_name(name)}", *cells)
    return table


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Show ``rows`` of a label and one cell for each of ``columns``, without cutting any off."""
    table = FigureTable(title)
    table.add_column("", overflow="fold", min_width=12)
    for column in columns:
        heading = " -> ".join(part.strip() for part in column.split("→"))
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


_MAIN = (
    ("text_to_image", "r@1"),
    ("text_to_image", "r@10"),
    ("image_to_text", "r@1"),
    ("image_to_text", "r@10"),
    ("text_to_image", "median_rank"),
)
"""The figures that are shown first, after mean recall."""


def verdict(compared: dict[str, Any]) -> str:
    """Say in a sentence what fine-tuning did; ``compared`` is ``Comparison.to_dict``."""
    before = compared["before"]["recall"]
    if not compared["after"]:
        return f"Mean recall is {value('recall', before)}."
    after, change = compared["after"]["recall"], compared["difference"]["recall"]
    moved = f"from {value('recall', before)} to {value('recall', after)}"
    points = f"{100 * change['value']:+.1f} points"
    if change.get("low") is None:
        return f"Mean recall went {moved} ({points})."
    points += f", 95% interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"
    if not change["clear"]:
        return f"No clear difference: mean recall went {moved} ({points})."
    if change["value"] > 0:
        return f"Fine-tuning helped: mean recall rose {moved} ({points})."
    return f"Fine-tuning did harm: mean recall fell {moved} ({points})."


def main_table(
    title: str, compared: dict[str, Any], model: str = "pretrained", general: Any = None
) -> Table:
    """Show the figures that matter most, of one model or of two and their difference.

    ``general`` is the comparison on a general data set, of which mean recall is shown.
    """
    tuned = ["fine-tuned", "difference"] if compared["after"] else []
    size = counted(compared["before"]["pairs"], "pair")
    table = FigureTable(f"{title}: {size}", "figure", model, *tuned)

    def add(label: str, name: str, found: dict[str, Any], *path: str) -> None:
        def figure(of: str) -> dict[str, Any]:
            within = found[of]
            for key in path:
                within = within[key]
            return within if isinstance(within, dict) else {"value": within}

        cells = [with_interval(name, figure("before"))]
        if tuned:
            change = found["difference"]
            for key in path:
                change = change if key == "figures" else change[key]
            cells += [with_interval(name, figure("after")), signed(name, change)]
        table.add_row(label, *cells)

    add("mean recall", "recall", compared, "recall")
    for direction, name in _MAIN:
        label = f"{DIRECTIONS[direction]} {figure_name(name)}"
        add(label, name, compared, "paired", direction, "figures", name)
    if general:
        add("mean recall, general set", "recall", general, "recall")
    return table


def comparison_tables(
    title: str, compared: dict[str, Any], model: str = "pretrained"
) -> Iterator[Table]:
    """Make one table for each protocol of ``Comparison.to_dict``.

    ``model`` is the heading of the first model, the only one when nothing was fine-tuned.
    """
    before, after = compared["before"], compared["after"]
    tuned = ["fine-tuned", "difference"] if after else []
    for protocol in ("paired", "grouped"):
        paired = protocol == "paired"
        if paired:
            size = figures.counted_pairs(before)
        else:
            part = before["grouped"]["text_to_image"]
            size = f"{counted(part['queries'], 'caption')}, {counted(part['candidates'], 'image')}"
        table = FigureTable(
            f"{title}, {protocol}: {size}",
            *("figure", model, *tuned, *(["upper bound"] if paired else [])),
            caption=compared["definitions"][protocol]["protocol"],
        )
        for direction, label in DIRECTIONS.items():
            table.add_row(Text(label, style="bold"))
            part = before[protocol][direction]
            for name in _shown(protocol, part["figures"]):
                row = [f"  {figure_name(name)}", with_interval(name, part["figures"][name])]
                if after:
                    row.append(with_interval(name, after[protocol][direction]["figures"][name]))
                    row.append(signed(name, compared["difference"][protocol][direction][name]))
                if paired:
                    row.append(value(name, part["ceiling"][name]))
                table.add_row(*row)
        yield table


def _shown(protocol: str, names: dict[str, Any]) -> list[str]:
    return [name for name in names if protocol == "paired" or name in _GROUPED]


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
            row.append(with_interval("r@10", found["r@10"]))
        if tuned:
            change = compared["difference"]["by_category"][name]["paired"]["text_to_image"]
            row.append(signed("r@10", change["r@10"]))
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
        table.add_row(size, *(value("recall", figure) for figure in found))
    return table


def definitions(compared: dict[str, Any]) -> Table:
    """Explain every figure shown; ``compared`` is ``Comparison.to_dict``."""
    table = FigureTable("Definitions", "figure")
    table.add_column("", ratio=1)
    words = compared["definitions"]
    table.add_row("mean recall", RECALL_DEFINITION.split(": ", 1)[1])
    for protocol in ("paired", "grouped"):
        for name in _shown(protocol, words[protocol]):
            if name != "protocol":
                table.add_row(f"{protocol} {figure_name(name)}", words[protocol][name])
    table.add_row("ties", words["ties"])
    table.add_row(Text("[low, high]"), words["interval"])
    return table


def sweep_table(points: list[dict[str, Any]], best: float) -> Table:
    """Show mean recall at each point between the pretrained and the fine-tuned weights."""
    keep = any(point["keep"] for point in points)
    kept = ["recall, kept set", "change, kept set"] if keep else []
    table = FigureTable(
        "Between the pretrained (0) and the fine-tuned (1) weights",
        *("alpha", "recall", "gain", *kept),
        caption="recall: mean of paired R@1, R@5 and R@10 in both directions",
    )
    for point in points:
        row = [f"{point['alpha']:g}", value("r", point["recall"]), signed("r", point["gain"])]
        if keep:
            row.append(value("r", point["keep"]["recall"]))
            row.append(signed("r", point["keep"]["change"]))
        table.add_row(*row, style="bold" if point["alpha"] == best else None)
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
    table.add_row("  top-1", *(with_interval("r", figure) for figure in top1))
    table.add_row("  top-5", *(value("r", column["top5"]) for column in columns))
    recalls = (value("r", column["mean_per_class_recall"]) for column in columns)
    table.add_row("  mean per-class recall", *recalls)
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
