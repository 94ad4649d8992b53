"""The contact sheet of a search: an HTML file with the images that were found, best first."""

from collections.abc import Sequence
from dataclasses import dataclass

from clipft.report.html import render

SHEET_SIDE = 240
"""Longer side in pixels of an image on the sheet."""


@dataclass(frozen=True)
class SheetImage:
    """An image that was found. ``jpeg`` is a thumbnail; ``source`` is its shard or folder."""

    key: str
    source: str
    score: float
    caption: str
    jpeg: bytes


def contact_sheet(
    query: str, remarks: Sequence[str], images: Sequence[SheetImage], query_image: bytes | None
) -> str:
    """Render the page. ``query_image`` is a small JPEG of the image that was the query."""
    return render(
        "search.html", heading=query, remarks=remarks, images=images, query_image=query_image
    )
