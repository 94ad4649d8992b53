"""Tables of pictures: CSV, TSV, JSONL and Parquet.

One column names the picture (a path relative to the table's folder, a URL, or in Parquet its
bytes), one holds the caption; all others become the pair's metadata.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from clipft.core.errors import DataError, UsageError
from clipft.data.packing.download import Pictures
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.shards.tar import ByteRange

IMAGE_COLUMNS = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "image_url",
    "url",
)
CAPTION_COLUMNS = ("caption", "text", "title", "description", "name")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_DELIMITERS, ".jsonl", ".parquet")
_BATCH = 1024
_UNREADABLE = "correct what is named, or save the table anew as UTF-8"


def list_table(table: Path, options: PackOptions, pictures: Pictures) -> Listing:
    """The rows that name a picture and have words.

    Raises:
        DataError: not a table, or one that cannot be read.
        UsageError: it has no such column; pyarrow is missing.
        StorageError, OSError: pictures inside of the table cannot be laid out.
    """
    listing, columns = Listing(), _columns(table)
    if not columns:
        return listing
    image_column = _column(options.image_column, IMAGE_COLUMNS, columns, table, "--image-column")
    caption_column = _column(
        options.caption_column, CAPTION_COLUMNS, columns, table, "--caption-column"
    )
    for number, row in enumerate(_rows(table, image_column), start=1):
        place, words = row.pop(image_column, None), row.pop(caption_column, None)
        found = _picture(place, table, number, pictures)
        if isinstance(found, str):
            listing.skip(place if isinstance(place, str) and place else f"{table}:{number}", found)
        elif not isinstance(words, str | int | float | None):
            listing.skip(found[1], "the caption is not text")
        else:
            rest = _utf8(json.dumps(_plain(row), ensure_ascii=False)) if row else None
            caption = _utf8("" if words is None else str(words))
            listing.candidates.append(Candidate(*found, caption, rest))
    return listing


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # JSON may hold half a character


def _picture(
    value: object, table: Path, number: int, pictures: Pictures
) -> tuple[str, str, ByteRange | str] | str:
    """Name, what people know it by and place (or URL) of a row's picture; or what is wrong."""
    if isinstance(value, dict):  # as Hugging Face stores pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        name = f"{table.stem}_{number}"
        return name, f"{table}:{number}", pictures.put(value)
    if not isinstance(value, str) or not value:
        return "no such file"
    if "://" in value or value.startswith("data:"):
        if not value.lower().startswith(("http://", "https://")):
            return "neither a path nor an http or https address"
        return _name_in(value), value, value
    path = str(table.parent / value)
    return PurePosixPath(value).stem, path, ByteRange(path)


def _name_in(url: str) -> str:
    try:
        return PurePosixPath(unquote(urlsplit(url).path)).stem
    except ValueError:
        return ""


def _columns(table: Path) -> list[str]:
    suffix = table.suffix.lower()
    if suffix not in _SUFFIXES or not table.is_file():
        raise DataError(
            f"{table} is neither a folder nor a table ({', '.join(_SUFFIXES)})",
            "name the folder with the raw files or shards, or a table of pictures",
        )
    if suffix == ".parquet":
        return [str(name) for name in _parquet(table).schema_arrow.names]
    return list(next(_rows(table, ""), {}))


def _column(named: str, usual: Sequence[str], columns: list[str], table: Path, option: str) -> str:
    for name in [named] if named else usual:
        if name in columns:
            return name
    raise UsageError(
        f"no column {named or ' or '.join(usual)} in {table}: it has {', '.join(columns)}",
        f"name the column with {option}",
    )


def _rows(table: Path, image_column: str) -> Iterator[dict[str, Any]]:
    suffix = table.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(table, image_column)
            return
        with table.open(encoding="utf-8-sig", newline="") as file:
            if suffix in _DELIMITERS:
                yield from csv.DictReader(file, delimiter=_DELIMITERS[suffix], restkey="_more")
                return
            for line in file:
                if line.strip():
                    yield _json_object(line)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"cannot read {table}: {error}", _UNREADABLE) from error


def _json_object(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("a line is not a JSON object")
    return value


def _parquet(table: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            f"reading {table} needs pyarrow", "run `pipx inject clipft pyarrow`"
        ) from error
    try:
        return ParquetFile(table)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {table}: {error}", "save the table anew, as Parquet or as CSV"
        ) from error


def _parquet_rows(table: Path, image_column: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    file = _parquet(table)
    columns = [
        field.name
        for field in file.schema_arrow
        if field.name == image_column or not _holds_bytes(field.type)
    ]
    try:
        for batch in file.iter_batches(_BATCH, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {table}: {error}", "save the table anew, as Parquet or as CSV"
        ) from error


def _holds_bytes(kind: Any) -> bool:
    """A column whose bytes would only be read to be left out."""
    from pyarrow import types

    if types.is_nested(kind):
        return any(_holds_bytes(kind.field(at).type) for at in range(kind.num_fields))
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are none become null, times their ISO text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        number = math.nan if isinstance(value, Decimal) and value.is_nan() else float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value if not isinstance(part, bytes)]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
