"""Reads tables of JSON: an object in each line (JSONL), or one array of objects."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from clipft.core.errors import DataError
from clipft.data.packing.options import PackOptions
from clipft.data.packing.rows.delimited import encoding_of, reading

SUFFIXES = (".jsonl", ".ndjson", ".json")
# Rows that are read for the names of the columns, because a row may leave out null values
_SAMPLED = 1000


class JsonTable:
    """A table of JSON objects; its ``columns`` are the keys of the first rows."""

    def __init__(self, path: Path, options: PackOptions) -> None:
        """Read the names of the columns.

        Raises:
            DataError: The file cannot be read, or not in this encoding.
        """
        self.path = path
        self.encoding = encoding_of(path, options.encoding)
        first = list(islice(self.rows(), _SAMPLED))
        objects = [row for _, row in first if isinstance(row, dict)]
        self.columns = list(dict.fromkeys(name for row in objects for name in row))
        if first and not objects:
            raise DataError(
                f"cannot read {path}: row 1 is {first[0][1]}",
                'write one object in each line, such as {"image": "a.jpg", "caption": "a chair"}',
            )

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield objects that together have every field of the metadata."""
        return (row for _, row in self.rows() if isinstance(row, dict))

    def rows(self, image: str = "", *captions: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield the number of each row, from 1, with its values or the reason why it is skipped.

        The names of the columns of images and captions are ignored.

        Raises:
            DataError: The file cannot be read, or not in this encoding.
        """
        with reading(self.path, self.encoding):
            if self.path.suffix.lower() == ".json":
                yield from enumerate(map(_checked, self._array()), start=1)
                return
            with self.path.open(encoding=self.encoding) as file:
                lines = (line for line in file if line.strip("\ufeff \t\r\n"))
                yield from enumerate(map(_parse, lines), start=1)

    def _array(self) -> list[Any]:
        try:
            rows = json.loads(self.path.read_text(encoding=self.encoding).removeprefix("\ufeff"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"cannot read {self.path}: {error}", "correct it, or save it again as JSON lines"
            ) from error
        if not isinstance(rows, list):
            raise DataError(
                f"{self.path} does not hold a list of objects",
                "write one JSON object for each pair, in a list or in the lines of a .jsonl file",
            )
        return rows


def _parse(line: str) -> dict[str, Any] | str:
    try:
        return _checked(json.loads(line.removeprefix("\ufeff")))
    except (ValueError, RecursionError):  # ValueError: also for a number of thousands of digits
        return "not valid JSON"


def _checked(row: Any) -> dict[str, Any] | str:
    return row if isinstance(row, dict) else "not a JSON object"
