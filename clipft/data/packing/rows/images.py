"""Finds the image that a cell of a table names: a path, a URL, or the image itself."""

import base64
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from clipft.data.packing.download import save_image
from clipft.data.shards.tar import ByteRange

# The first characters of JPEG, PNG, GIF, WebP, BMP and TIFF in base64
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0A")
_URLSAFE = str.maketrans("-_", "+/", " \t\r\n")
# Longer text without a file suffix is no path but an image in base64
_LONGEST_PATH = 255

Place = tuple[str, str, ByteRange | str]
"""The first three fields of a ``Candidate``: ``name``, ``where`` and ``image``."""


class ImageCells:
    """Finds the images of one table. Images inside the table are saved in the folder ``images``.

    Paths are relative to the folder of the table. If no image of the first rows exists there, paths
    are also tried relative to the working folder, and without their first folders, which may be
    those of another machine. The combination that finds most images is used for all rows.
    """

    def __init__(self, table: Path, images: Path, first: Sequence[Any]) -> None:
        """Choose the folder that paths are relative to, from the cells of the first rows."""
        self._table, self._images = table, images
        self.root, self.prefix = table.parent, ""
        paths = [cell.strip().replace("\\", "/") for cell in first if _is_path(cell)]
        if paths and not self._count(self.root, "", paths):
            places = [(root, cut) for cut in _starts(paths[0]) for root in (self.root, Path.cwd())]
            self.root, self.prefix = max(places, key=lambda at: self._count(at[0], at[1], paths))

    @staticmethod
    def _count(root: Path, prefix: str, paths: Sequence[str]) -> int:
        return sum(os.path.exists(root / path.removeprefix(prefix)) for path in paths)

    def find(self, cell: object, number: int) -> Place | str:
        """Return the image of a row, or the reason why there is none."""
        if isinstance(cell, list) and len(cell) == 1:
            cell = cell[0]
        if isinstance(cell, dict):  # as Hugging Face datasets store images
            held = cell.get("bytes")
            if isinstance(held, bytes):
                return self._save(held, number)
            cell = held or cell.get("path")
        if isinstance(cell, bytes):
            cell = _text_of(cell) or cell
        if isinstance(cell, bytes):
            return self._save(cell, number)
        if not isinstance(cell, str) or not cell.strip():
            return "no image is named"
        if (held := _decoded(cell)) is not None:
            return self._save(held, number)
        if "://" in cell or cell.startswith("data:"):
            return _url(cell)
        path = self._path(cell.strip())
        return PurePosixPath(path).stem, path, ByteRange(path)

    def _save(self, data: bytes, number: int) -> Place:
        place = self._images / hashlib.sha256(data).hexdigest()
        name, where = f"{self._table.stem}_{number}", row_name(self._table, number)
        return name, where, save_image(place, data)

    def _path(self, cell: str) -> str:
        path = str(self.root / cell.removeprefix(self.prefix))
        if (cell.isascii() and "\\" not in cell) or os.path.exists(path):
            return path
        plain = str(self.root / cell.replace("\\", "/").removeprefix(self.prefix))
        # Accents may be composed in the table and decomposed in the file name
        variants = [plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))]
        return next((path for path in variants if os.path.exists(path)), plain)


def row_name(table: Path, number: int) -> str:
    """Return the name of a row in messages. Rows are counted from 1, without the header."""
    return f"{table} row {number}"


def _is_path(cell: object) -> bool:
    return (
        isinstance(cell, str)
        and bool(cell.strip())
        and "://" not in cell
        and not cell.startswith("data:")
        and _decoded(cell) is None
    )


def _starts(path: str) -> Iterator[str]:
    """Yield the prefixes of a path that may be left out: none, its first folder, two folders ..."""
    yield ""
    at = path.find("/")
    while at >= 0:
        yield path[: at + 1]
        at = path.find("/", at + 1)


def _text_of(data: bytes) -> str | None:
    """Return bytes as text if they are a path or a URL: some writers store all texts as bytes."""
    if len(data) > 4096:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() and text.strip() else None


def _decoded(cell: str) -> bytes | None:
    """Return the bytes of an image in base64, with or without ``data:...`` before it."""
    if cell.startswith("data:"):
        head, _, body = cell.partition(",")
        if not head.endswith(";base64"):
            return None
    elif cell.startswith(_BASE64_STARTS) or (len(cell) > _LONGEST_PATH and "." not in cell):
        body = cell
    else:
        return None
    body = body.translate(_URLSAFE).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        return None


def _url(cell: str) -> Place | str:
    url = cell.strip()
    if not url.lower().startswith(("http://", "https://")):
        return "neither a path nor an http or https address"
    try:
        name = PurePosixPath(unquote(urlsplit(url).path)).stem
    except ValueError:  # reported when the download fails
        name = ""
    return name, url, url
