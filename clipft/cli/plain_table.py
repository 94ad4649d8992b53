"""Plain tables that fit a terminal of any width."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PLAIN_STYLE: dict[str, Any] = {
    "box": box.SIMPLE,
    "show_edge": False,
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}
_GAP = 2
"""Columns between two columns of such a table."""
_UNLIMITED = 10_000
"""More columns than any table needs."""
_LONGEST_WORD = 24
"""Columns of a word, beyond which it is broken on a terminal that is too narrow."""


class FigureTable(Table):
    """A plain table with a title above and a caption below, which may both be wider than it.

    The first column is aligned left, the others right. Where the terminal is too narrow for
    cells such as ``15.4% [10.9, 19.6]``, all intervals move to a line below their values, and
    what is still too wide is broken between words.
    """

    def __init__(self, title: str, *headings: str, caption: str = "") -> None:
        super().__init__(**PLAIN_STYLE)
        # Not rich's own title and caption: those are wrapped at the width of the table
        self._above, self._below = title, caption
        for number, heading in enumerate(headings):
            self.add_column(heading, justify="right" if number else "left")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table: Table = self
        wanted = Measurement.get(console, options.update(max_width=_UNLIMITED), self).maximum
        if wanted > options.max_width:
            table = self._narrow(options.max_width)
        yield Text(f"\n{self._above}", style="italic")
        yield from Table.__rich_console__(table, console, options)
        if self._below:
            yield Text(self._below, style="italic")

    def _narrow(self, width: int) -> Table:
        table = Table(**PLAIN_STYLE, show_header=self.show_header)
        columns = [[_broken(cell) for cell in column.cells] for column in self.columns]
        heads = [
            [column.header, *cells] for column, cells in zip(self.columns, columns, strict=True)
        ]
        fitted = _fitted(heads, width - _GAP * (len(columns) - 1))
        for column, fit in zip(self.columns, fitted, strict=True):
            table.add_column(column.header, justify=column.justify, width=fit, overflow="fold")
        for row, values in zip(self.rows, zip(*columns, strict=True), strict=True):
            table.add_row(*values, style=row.style)
        return table


def _broken(cell: Any) -> Any:
    return cell.replace(" [", "\n[") if isinstance(cell, str) else cell


def _fitted(columns: Sequence[Sequence[Any]], width: int) -> list[int]:
    """Choose the columns' widths: as wide as their lines, but where all of them need more than
    ``width``, the widest ones no wider than their longest word."""
    texts = [[c.plain if isinstance(c, Text) else str(c) for c in cells] for cells in columns]
    widths = [max(cell_len(line) for t in cells for line in t.split("\n")) for cells in texts]
    words = [
        max((cell_len(word) for t in cells for word in t.split()), default=1) for cells in texts
    ]
    while sum(widths) > width:
        spare = [n for n, size in enumerate(widths) if size > min(max(1, words[n]), _LONGEST_WORD)]
        if not spare:
            break
        widths[max(spare, key=widths.__getitem__)] -= 1
    return widths


def rows_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    texts: Collection[int] = (),
    label: str = "",
) -> Table:
    """Show ``rows`` of a label and one cell for each of ``columns``.

    Args:
        title: what is shown.
        columns: headings after that of the label. If all are empty, there is no line of headings.
        rows: the cells, which may hold any characters.
        texts: the numbers, from 0, of the columns that hold words and are aligned left.
        label: the heading of the labels.
    """
    table = FigureTable(title, label)
    table.show_header = any(columns)
    for number, name in enumerate(columns):
        heading = name.replace("→", "->")
        table.add_column(heading, justify="left" if number in texts else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because brackets in a path are not markup
    return table
