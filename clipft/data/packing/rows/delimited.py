"""Reads tables of delimited text (CSV, TSV): their encoding, delimiter, quotes and rows.

Real files often break the rules of CSV. A row must have as many cells as the header. If it does not
when it is parsed by the rules, its first line is parsed in other ways: with spaces after the
delimiter, quotes escaped with a backslash, quotes inside a quoted cell, and quotes that are text. A
row that none of these can parse is skipped with a reason, and reading continues at the next line,
so that one quotation mark never swallows the rest of a table.
"""

import codecs
import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from clipft.core.errors import DataError
from clipft.core.text import marked_encoding, unmarked_encoding
from clipft.data.packing.options import PackOptions
from clipft.data.packing.rows.columns import caption_columns, image_column, names_image

SUFFIXES = {".csv": ",", ".txt": ",", ".tsv": "\t", ".tab": "\t"}
"""The suffixes of delimited text, each with its usual delimiter."""

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
# Pandas, R and databases write these for a missing value
MISSING = {"nan", "NaN", "<NA>", "N/A", "n/a", "#N/A", "null", "NULL", "None", "\\N"}
# In files for Excel, this line states the delimiter
_SEPARATOR_LINE = re.compile(r"sep=(.)")
_START = 64
_ESCAPED = re.compile(r'(?<!\\)\\"')
UNMATCHED = "an unmatched quotation mark"


class DelimitedTable:
    """A table of delimited text.

    Attributes:
        columns: The names in the header, without spaces around them and without unnamed columns.
        repaired: The numbers of rows whose quotation marks had to be guessed.
    """

    def __init__(self, path: Path, options: PackOptions) -> None:
        """Read the header.

        Raises:
            DataError: The file cannot be read, or not in this encoding.
        """
        self.path, self.repaired = path, list[int]()
        self.encoding = encoding_of(path, options.encoding)
        with self._opened() as lines:
            stated = _skip_to_header(lines)
            self._delimiter = options.delimiter or stated or _find_delimiter(lines, path, options)
            cells = next(csv.reader(lines, delimiter=self._delimiter), [])
        # "image, caption": the spaces belong to the delimiter, before quotes too
        self._spaced = len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
        self._header = _unique([cell.strip() for cell in cells])
        self.columns = [name for name in self._header if name]

    @property
    def delimiter(self) -> str:
        """The delimiter in words, for messages."""
        return _NAMES.get(self._delimiter, repr(self._delimiter))

    def samples(self) -> Iterator[dict[str, str]]:
        """Yield one row with empty values that has every field of the metadata."""
        yield dict.fromkeys(self.columns, "")

    def rows(self, image: str, *captions: str) -> Iterator[tuple[int, dict[str, str | None] | str]]:
        """Yield the number of each row, from 1, with its values or the reason why it is skipped.

        Missing values are None. A line inside a quoted cell is taken for a row if its column
        ``image`` looks like an image.

        Raises:
            DataError: The file cannot be read, or not in this encoding.
        """
        self.repaired.clear()
        with self._opened() as lines:
            for number, cells in self._records(lines, self._header.index(image)):
                if isinstance(cells, str):
                    yield number, cells
                else:
                    named = zip(self._header, cells, strict=True)
                    yield number, {n: None if c in MISSING else c for n, c in named if n}

    def _records(self, lines: "_Lines", image: int) -> Iterator[tuple[int, list[str] | str]]:
        _skip_to_header(lines)
        next(csv.reader(lines, delimiter=self._delimiter))
        width, number = len(self._header), 0
        reader = csv.reader(
            lines, delimiter=self._delimiter, strict=True, skipinitialspace=self._spaced
        )
        while True:
            lines.taken.clear()
            try:
                cells = next(reader, None)
            except csv.Error:
                cells = []
            else:
                if cells is None:
                    return
                if not any(map(str.strip, cells)):  # a blank line, or one with only delimiters
                    number += bool(cells)
                    continue
            number += 1
            # The normal case: as many cells as the header, on one line
            whole = len(cells) == width
            if whole and (len(lines.taken) == 1 or not self._swallows(lines.taken, image)):
                yield number, cells
            else:
                read = self._repair(lines, [] if whole else cells, image)
                if isinstance(read, list):
                    self.repaired.append(number)
                yield number, read

    def _swallows(self, taken: list[str], image: int) -> bool:
        """Return whether one of the lines inside a quoted cell looks like a row."""
        for line in taken[1:]:
            cells = line.rstrip("\r\n").split(self._delimiter)
            before = "".join(cells[: image + 1])
            if len(cells) == len(self._header) and '"' not in before and names_image(cells[image]):
                return True
        return False

    def _repair(self, lines: "_Lines", cells: list[str], image: int) -> list[str] | str:
        """Parse a row in other ways.

        ``cells`` is the result by the rules of CSV. It is empty if quotes do not match. Then only
        the first line is used, and the others are read again.
        """
        width = len(self._header)
        if len(cells) > width and not any(cells[width:]):  # delimiters at the end of the line
            return cells[:width]
        if any('\\"' in line for line in lines.taken) and (read := self._unescaped(lines, image)):
            return read
        if cells and len(lines.taken) > 1:
            return _wrong_width(len(cells), width)
        lines.give_back(lines.taken[1:])
        line = lines.taken[0].rstrip("\r\n")
        for read in self._readings(line, literal=not cells):
            if len(read) == width:
                return read
        return _wrong_width(len(cells), width) if cells else UNMATCHED

    def _unescaped(self, lines: "_Lines", image: int) -> list[str]:
        """Parse a row whose quotes are escaped with backslashes, as MySQL and Spark write them.

        If this is no such row, the result is empty and the lines are given back.
        """
        count = len(lines.taken)
        lines.give_back(lines.taken)
        lines.taken.clear()
        doubled = (_ESCAPED.sub('""', line) for line in lines)
        with suppress(csv.Error):
            cells = next(csv.reader(doubled, delimiter=self._delimiter, strict=True), [])
            if len(cells) == len(self._header) and not self._swallows(lines.taken, image):
                return cells
        lines.give_back(lines.taken)
        lines.taken.clear()
        for _ in range(count):
            next(lines)
        return []

    def _readings(self, line: str, literal: bool) -> Iterator[list[str]]:
        with suppress(csv.Error):
            yield next(
                csv.reader([line], delimiter=self._delimiter, strict=True, skipinitialspace=True)
            )
        yield self._lenient(line)
        if literal:
            yield line.split(self._delimiter)

    def _lenient(self, line: str) -> list[str]:
        """Split a line whose quoted cells may contain quotes: a quote ends a cell only before a
        delimiter or at the end of the line."""
        end = rf" *(?:{re.escape(self._delimiter)}|$)"
        quoted = re.compile(rf' *"((?:""|\\"|[^"]|"(?!{end}))*+)"(?={end}) *')
        cells, at = list[str](), 0
        while True:
            if found := quoted.match(line, at):
                cells.append(found[1].replace('""', '"').replace('\\"', '"'))
                at = found.end()
            else:
                close = line.find(self._delimiter, at)
                cells.append(line[at : close if close >= 0 else len(line)])
                at = close if close >= 0 else len(line)
            if at >= len(line):
                return cells
            at += 1  # the delimiter

    @contextmanager
    def _opened(self) -> Iterator["_Lines"]:
        csv.field_size_limit(sys.maxsize)  # the default is 128 KiB, but a cell may hold a web page
        # newline="": the line ends within quotes are kept as they are
        with (
            reading(self.path, self.encoding),
            self.path.open(encoding=self.encoding, newline="") as file,
        ):
            yield _Lines(file)


class _Lines:
    """The lines of a file. ``taken`` holds the lines read since it was last cleared; they can be
    given back."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._again, self.taken = file, deque[str](), list[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.taken.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        self._again.extendleft(reversed(lines))


def encoding_of(path: Path, named: str) -> str:
    """Return the encoding of a text file, from its byte-order mark, the user's choice or its first
    bytes, in this order.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise _unreadable(path, error) from error
    marked = marked_encoding(start)
    return marked[0] if marked else named or unmarked_encoding(start)


@contextmanager
def reading(path: Path, encoding: str) -> Iterator[None]:
    """Raise a ``DataError`` with a hint if reading a text fails inside the block."""
    try:
        yield
    except UnicodeError as error:
        line = _bad_line(path, encoding)
        raise DataError(
            f"cannot read {path} as {encoding.upper()}"
            + (f": line {line} has invalid bytes" if line else f": {error}"),
            "name its encoding, for example --encoding cp1252 (Western Europe), cp1251 (Cyrillic) "
            "or shift_jis (Japanese); or save the table again as UTF-8",
        ) from error
    except (OSError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(f"cannot read {path}: {reason}", "save the table again as UTF-8")


def _bad_line(path: Path, encoding: str) -> int:
    """Return the number of the first line that is not in this encoding, or 0 if it is unknown."""
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        return 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return number
    return 0


def _skip_to_header(lines: _Lines) -> str | None:
    """Move to the header. Return the delimiter if a line ``sep=...`` before it states one."""
    stated = None
    for line in lines:
        text = line.lstrip("\ufeff")
        found = _SEPARATOR_LINE.fullmatch(text.rstrip("\r\n"))
        if found and stated is None:
            stated = found[1]
        elif text.strip():
            lines.give_back([text])
            break
    return stated


def _find_delimiter(lines: _Lines, path: Path, options: PackOptions) -> str:
    """Return the delimiter that gives the header recognizable columns.

    If several do, the usual delimiter of the suffix is preferred.
    """
    line = next(lines, "")
    lines.give_back([line] if line else [])

    def fit(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        image = image_column(names, options.image_column)
        captions = caption_columns(names, options.caption_column)
        return (image is not None) + bool(captions), len(names)

    return max((SUFFIXES[path.suffix.lower()], *_DELIMITERS), key=fit)


def _unique(names: list[str]) -> list[str]:
    """Number the columns that share a name: ``size``, ``size_2``."""
    found = list[str]()
    for name in names:
        number, unique = 1, name
        while unique and unique in found:
            number += 1
            unique = f"{name}_{number}"
        found.append(unique)
    return found


def _wrong_width(found: int, width: int) -> str:
    more = "more" if found > width else "fewer"
    return f"{more} cells than the header ({found} instead of {width})"
