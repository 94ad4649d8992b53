"""Lists the pairs of a table: CSV, TSV, JSONL or Parquet.

One column names the image (a path relative to the table's folder, a URL or, in Parquet, its bytes)
and one holds the caption. All others become the pair's metadata.
"""

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from clipft.core.errors import DataError, UsageError
from clipft.data.captions.lines import join_lines
from clipft.data.packing.download import save_image
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.shards.tar import ByteRange

# Usual names of the columns, the most specific first
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
_SAVE_AGAIN = "save the table again, as Parquet or as CSV"


def list_table(table: Path, options: PackOptions, images: Path) -> Listing:
    """List the rows that have an image and a caption. Images within the table are saved in the
    folder ``images``.

    Raises:
        DataError: The file is not such a table, or cannot be read.
        UsageError: There is no column of images or captions, or pyarrow is not installed.
        OSError: The disk is full, or refuses to write.
    """
    listing, columns = Listing(), _find_columns(table, options)
    if not columns:
        return listing
    image_column, caption_column = columns
    for number, row in enumerate(_rows(table, image_column), start=1):
        place, words = row.pop(image_column, None), row.pop(caption_column, None)
        found = _find_image(place, table, number, images)
        if isinstance(found, str):
            listing.skip(place if isinstance(place, str) and place else f"{table}:{number}", found)
        elif (texts := _texts(words)) is None:
            listing.skip(found[1], "the caption is not text")
        else:
            caption = join_lines(texts)
            # "replace", because JSON may hold half of a surrogate pair
            rest = json.dumps(plain_value(row), ensure_ascii=False).encode("utf-8", "replace")
            listing.candidates.append(Candidate(*found, caption, rest if row else None))
    return listing


def _find_columns(table: Path, options: PackOptions) -> tuple[str, str] | None:
    """Return the columns of images and captions; None if a text table has no rows."""
    suffix = table.suffix.lower()
    if suffix not in _SUFFIXES or not table.is_file():
        raise DataError(
            f"{table} is neither a folder nor a table ({', '.join(_SUFFIXES)})",
            "name the folder with the raw files or shards, or a table of images",
        )
    if suffix == ".parquet":
        columns = [str(name) for name in _open_parquet(table).schema_arrow.names]
    else:
        columns = list(next(_rows(table, ""), {}))
    if not columns:
        return None
    found = []
    for option, named, usual in (
        ("--image-column", options.image_column, IMAGE_COLUMNS),
        ("--caption-column", options.caption_column, CAPTION_COLUMNS),
    ):
        column = next((name for name in ([named] if named else usual) if name in columns), None)
        if column is None:
            raise UsageError(
                f"{table} has no column {named or ' or '.join(usual)}; it has {', '.join(columns)}",
                f"name the column with {option}",
            )
        found.append(column)
    return found[0], found[1]


def _texts(value: object) -> list[str] | None:
    """Return the captions in a cell, which holds one or a list; None if it holds something else."""
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(text, str | int | float | None) for text in values):
        return None
    return [str(text) for text in values if text is not None]


def _find_image(
    value: object, table: Path, number: int, images: Path
) -> tuple[str, str, ByteRange | str] | str:
    """Return the first three fields of a row's ``Candidate``, or the reason to skip it."""
    if isinstance(value, dict):  # as Hugging Face datasets store images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        place = images / hashlib.sha256(value).hexdigest()
        return f"{table.stem}_{number}", f"{table}:{number}", save_image(place, value)
    if not isinstance(value, str) or not value:
        return "no such file"
    if "://" in value or value.startswith("data:"):
        if not value.lower().startswith(("http://", "https://")):
            return "neither a path nor an http or https address"
        try:
            name = PurePosixPath(unquote(urlsplit(value).path)).stem
        except ValueError:  # it is reported when the download fails
            name = ""
        return name, value, value
    path = str(table.parent / value)
    return PurePosixPath(value).stem, path, ByteRange(path)


def _rows(table: Path, image_column: str) -> Iterator[dict[str, Any]]:
    suffix = table.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(table, image_column)
            return
        # Excel starts its UTF-8 files with a byte order mark
        with table.open(encoding="utf-8-sig", newline="") as file:
            if suffix in _DELIMITERS:
                yield from csv.DictReader(file, delimiter=_DELIMITERS[suffix], restkey="_more")
                return
            for line in file:
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("a line is not a JSON object")
                    yield row
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        hint = "correct the error, or save the table again as UTF-8"
        raise DataError(f"cannot read {table}: {error}", hint) from error


def _open_parquet(table: Path) -> Any:
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
        raise DataError(f"cannot read {table}: {error}", _SAVE_AGAIN) from error


def _parquet_rows(table: Path, image_column: str) -> Iterator[dict[str, Any]]:
    file = _open_parquet(table)
    from pyarrow import ArrowException

    # Metadata is JSON, which holds no bytes: do not read columns of them only to drop them
    columns = [
        field.name
        for field in file.schema_arrow
        if field.name == image_column or not _holds_bytes(field.type)
    ]
    try:
        for batch in file.iter_batches(_BATCH, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {table}: {error}", _SAVE_AGAIN) from error


def _holds_bytes(kind: Any) -> bool:
    """Return whether values of this Arrow type are bytes, or contain some."""
    from pyarrow import types

    if types.is_nested(kind):
        return any(_holds_bytes(kind.field(at).type) for at in range(kind.num_fields))
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def plain_value(value: Any) -> Any:
    """Return ``value`` as strict JSON can hold it.

    NaN and infinity become null, dates and times their ISO text, durations their seconds; bytes in
    lists and objects are dropped.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        # float() raises ValueError for a signaling NaN
        number = math.nan if isinstance(value, Decimal) and value.is_nan() else float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {str(k): plain_value(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value if not isinstance(part, bytes)]
    return plain_value(value.tolist()) if hasattr(value, "tolist") else str(value)
