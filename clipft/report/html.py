"""The common parts of all HTML pages: templates, thumbnails, tables, and writing the file.

Every page is a single file that needs no network, uses the reader's light or dark mode, and can be
read on a phone. The templates escape all values, so captions, keys and file names are shown
unchanged, even if they contain markup.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from clipft.core.files import write_text

SIDE = 96
"""Longer side of a thumbnail in pixels. With this size, a page can be sent by mail."""


@dataclass(frozen=True)
class PageTable:
    """A table of a page.

    Each row holds a label and a cell for each of ``columns``. Text after a line feed in a cell is
    small. ``texts`` are the indexes, from 0, of the columns that hold words, and ``best`` are the
    indexes of the rows to highlight. ``heading`` shows the title as a heading.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: bool = False
    texts: frozenset[int] = frozenset()
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PageImage:
    """A thumbnail with its place in the data and its caption. ``jpeg`` is empty if the image cannot
    be decoded."""

    place: str
    caption: str
    jpeg: bytes


def thumbnail(image: Image.Image, side: int = SIDE) -> bytes:
    """Encode an upright RGB image as a JPEG that fits a square of ``side`` pixels.

    ``image`` is resized in place.
    """
    buffer = io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def render(template: str, **values: Any) -> str:
    """Fill in a template of ``clipft/report/templates``."""
    return _templates().get_template(template).render(values)


def anchor(title: str) -> str:
    """Return the id of the section with this title."""
    return re.sub(r"[^\w-]+", "-", title.lower())


def code(text: str) -> Markup:
    """Escape a sentence, and show text in backticks as code."""
    parts = text.split("`")
    marked = [Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts)]
    return Markup("").join(marked)


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG as a data URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


@cache
def _templates() -> jinja2.Environment:
    def asset(name: str) -> str:
        text = files("clipft.report").joinpath("assets", name).read_text(encoding="utf-8")
        # The source map is not part of the page, and the browser would request it
        return re.sub(r"\n//# sourceMappingURL=.*", "", text)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipft.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = asset
    environment.filters |= {"anchor": anchor, "code": code, "data_uri": data_uri}
    return environment


def write_page(path: Path, page: str) -> None:
    """Write a page atomically, and replace an earlier one.

    Raises:
        StorageError: the disk is full or ``path`` cannot be written.
    """
    # A file name in a tar may contain bytes that are not UTF-8. They are shown as "?"
    write_text(path, page.encode("utf-8", errors="replace").decode("utf-8"))


def write_page_and_json(page: Path, html: str, content: dict[str, Any]) -> None:
    """Write a page, and its content as JSON beside it.

    Raises:
        StorageError: the disk is full or one of the files cannot be written.
    """
    write_page(page, html)
    write_page(page.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
