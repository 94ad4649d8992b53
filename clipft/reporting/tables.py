"""Figures as Rich tables."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

_DIRECTIONS = (("text -> image", "text_to_image"), ("image -> text", "image_to_text"))
_RECALLS = ("r@1", "r@5", "r@10")


def retrieval_table(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Retrieval figures side by side: ``columns`` maps a heading to ``Retrieval.to_dict``."""
    pairs = next(iter(columns.values()))["pairs"]
    table = Table(title=f"{title} ({pairs:,} pairs)", title_justify="left")
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    for label, direction in _DIRECTIONS:
        for name in _RECALLS:
            values = [f"{figures[direction][name]:.1%}" for figures in columns.values()]
            table.add_row(f"{label} {name.upper()}", *values)
        ranks = [f"{figures[direction]['median_rank']:g}" for figures in columns.values()]
        table.add_row(f"{label} median rank", *ranks)
        table.add_row(
            f"{label} MRR",
            *[f"{figures[direction]['mrr']:.3f}" for figures in columns.values()],
            end_section=True,
        )
    return table


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """``rows`` hold a label and a cell for each of ``columns``; nothing is cut off."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
