"""Figures as Rich tables."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clipft.words import counted

_DIRECTIONS = (("text -> image", "text_to_image"), ("image -> text", "image_to_text"))
_RECALLS = ("r@1", "r@5", "r@10")
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
    for label, direction in _DIRECTIONS:
        found = [figures[direction] for figures in columns.values()]
        table.add_row(Text(label, style="bold"))
        for name in _RECALLS:
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
