"""What a search found as one HTML file: the pictures, best first."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from clipft.report.html import document, paragraph

SHEET_SIDE = 240
"""Pixels of a picture's longer side on the sheet."""


@dataclass(frozen=True)
class SheetPicture:
    """``jpeg`` is small already; ``source`` is the shard or folder it lies in."""

    key: str
    source: str
    score: float
    caption: str
    jpeg: bytes


def contact_sheet(
    query: str, remarks: Sequence[str], pictures: Sequence[SheetPicture], asked: bytes | None
) -> str:
    """The whole page; ``asked`` is the picture that was searched with, as a small JPEG."""
    parts = [paragraph(remark, "remark") for remark in remarks]
    if asked is not None:
        parts.append(
            f'<img class="asked" src="{_inline(asked)}" alt="The picture searched with">\n'
        )
    figures = "".join(_figure(rank, picture) for rank, picture in enumerate(pictures, 1))
    parts.append(f'<ol class="sheet">\n{figures}</ol>\n')
    return document(query, parts)


def _figure(rank: int, picture: SheetPicture) -> str:
    caption = f"<p>{escape(picture.caption)}</p>" if picture.caption else ""
    alt = escape(picture.caption or picture.key)
    return (
        f'<li><figure><img src="{_inline(picture.jpeg)}" alt="{alt}" loading="lazy">'
        f'<figcaption><span class="score"><b>{rank}.</b> {picture.score:.3f}</span>{caption}'
        f'<small title="{escape(picture.source)}">{escape(picture.key)}</small>'
        "</figcaption></figure></li>\n"
    )


def _inline(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
