"""What every page is made of: one HTML file that needs no network, light or dark as its
reader's system is, readable on a phone. Every string is shown as it is, markup in it included.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from clipft.core.files import replacing

SIDE = 96
"""Thumbnails fit in a square of so many pixels; the file stays small enough to be mailed."""


@dataclass(frozen=True)
class PageTable:
    """``rows`` hold a label and a cell for each of ``columns``, whose second line is small;
    ``texts`` are the numbers of the columns that hold words, from 0; ``best`` those of the rows
    that stand out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: bool = False
    texts: frozenset[int] = frozenset()
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    place: str
    caption: str
    jpeg: bytes


def thumbnail(image: Image.Image, side: int = SIDE) -> bytes:
    """A small JPEG of an upright RGB picture, which is made small itself."""
    buffer = io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def asset(name: str) -> str:
    """The text of a file that the package carries for its pages."""
    return files("clipft.report").joinpath("assets", name).read_text(encoding="utf-8")


def document(heading: str, parts: Iterable[str], scripts: str = "") -> str:
    """The whole page; ``parts`` and ``scripts`` are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>\n{asset('page.css')}</style>\n</head>\n<body>\n"
        f"<main>\n<h1>{escape(heading)}</h1>\n{''.join(parts)}</main>\n{scripts}</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """``parts``, which are HTML, under a heading; nothing where there are none."""
    inner = "".join(parts)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}</section>\n" if inner else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def folded(summary: str, inner: str) -> str:
    return f"<details>\n<summary>{escape(summary)}</summary>\n{inner}</details>\n"


def table(shown: PageTable) -> str:
    """A table that scrolls by itself where it is wider than the page."""

    def cell(tag: str, number: int, text: str, scope: str = "") -> str:
        kind = ' class="text"' if number in shown.texts else ""
        first, below, rest = escape(text).partition("\n")
        small = f"<br><small>{rest}</small>" if below else ""
        return f"<{tag}{kind}{scope}>{first}{small}</{tag}>"

    scope = ' scope="col"'
    head = "".join(cell("th", i, column, scope) for i, column in enumerate(shown.columns))
    rows = "".join(
        f'<tr{" class=best" if i in shown.best else ""}><th scope="row">{escape(label)}</th>'
        + "".join(cell("td", at, text) for at, text in enumerate(cells))
        + "</tr>\n"
        for i, (label, *cells) in enumerate(shown.rows)
    )
    kind = ' class="title"' if shown.heading else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(shown.title)}"><table>\n'
        f"<caption{kind}>{escape(shown.title)}</caption>\n"
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def group(pictures: Iterable[Picture]) -> str:
    """Pictures beside each other."""
    return f'<div class="group">\n{"".join(map(figure, pictures))}</div>\n'


def figure(picture: Picture) -> str:
    words = f"<br>{escape(picture.caption)}" if picture.caption else ""
    return (
        f"<figure>{image(picture.jpeg, picture.place)}"
        f"<figcaption><b>{escape(picture.place)}</b>{words}</figcaption></figure>\n"
    )


def image(jpeg: bytes, place: str) -> str:
    """A picture within the page; words in the stead of one that cannot be shown."""
    if not jpeg:
        return "<p>no picture</p>"
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return f'<img src="{source}" alt="{escape(f"Photo {place}")}">'


def write_page(path: Path, page: str) -> None:
    """Write all of the page or nothing; a former one is replaced at once.

    Raises:
        StorageError: it cannot be written there.
    """
    with replacing(path) as temporary:
        # A file name in a tar may hold bytes that are no UTF-8
        temporary.write_text(page, encoding="utf-8", errors="replace")
