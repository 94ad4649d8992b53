"""Reads tables of Parquet and of Arrow, with columns of any type.

``save_to_disk`` of ``datasets`` writes Arrow files. Their schema has the names of class labels, and
says which columns hold images.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from clipft.core.errors import DataError, UsageError, first_line
from clipft.core.files import read_json

_BATCH = 1024
# Rows in a batch with images, which is in memory as a whole
_IMAGES = 64
_SAVE_AGAIN = "save the table again, as Parquet or as CSV"
# Errors of pyarrow for types that it cannot convert and for values that Python cannot hold, or only
# with pandas or tzdata: OverflowError (the year 20000), ValueError (nanoseconds, bytes that are not
# UTF-8), KeyError (a time zone)
_NO_VALUE = (ArithmeticError, ValueError, TypeError, LookupError, ImportError, NotImplementedError)


class ArrowTable:
    """A table of Parquet or of Arrow.

    Attributes:
        columns: The names of its columns.
        image_columns: The columns whose type says that they hold images or their paths.
        left_out: The columns that could not be read so far, with the reason.
    """

    def __init__(self, path: Path) -> None:
        """Read the names of the columns.

        Raises:
            DataError: The file cannot be read.
            UsageError: pyarrow is not installed.
        """
        self.path, self.left_out = path, dict[str, str]()
        schema = _open(path).schema_arrow
        self.columns = [str(name) for name in schema.names]
        self._features = _features(schema)
        self.image_columns = [
            str(field.name)
            for field in schema
            if _type_of(self._features.get(field.name)) == "Image" or _holds_image(field.type)
        ]

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield one row with placeholder values that has every field of the metadata."""
        yield {field.name: _sample(field.type) for field in _open(self.path).schema_arrow}

    def rows(self, image: str, *captions: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield the number of each row, from 1, with its values.

        Columns of bytes are left out unless they hold the images or captions, because metadata
        cannot hold bytes. Other columns that cannot be read are left out too.

        Raises:
            DataError: The file, or the column of images or captions, cannot be read.
        """
        from pyarrow import ArrowException

        file, number = _open(self.path), 0
        held = {field.name: holds_bytes(field.type) for field in file.schema_arrow}
        needed = (image, *captions)
        columns = [name for name, is_bytes in held.items() if name in needed or not is_bytes]
        batch = _IMAGES if any(held[name] for name in columns) else _BATCH
        try:
            for part in file.iter_batches(batch, columns=columns):
                values = {}
                for name, column in zip(part.schema.names, part.columns, strict=True):
                    if (read := self._values(name, column, name in needed)) is not None:
                        values[name] = read
                for row in range(part.num_rows):
                    number += 1
                    yield number, {name: column[row] for name, column in values.items()}
        except (ArrowException, OSError) as error:
            raise DataError(f"cannot read {self.path}: {first_line(error)}", _SAVE_AGAIN) from error

    def _values(self, name: str, column: Any, needed: bool) -> list[Any] | None:
        from pyarrow import ArrowException

        try:
            return _named(values_of(column), self._features.get(name))
        except (ArrowException, *_NO_VALUE) as error:
            if needed:
                raise DataError(
                    f"cannot read the column {name} of {self.path}: {first_line(error)}",
                    _SAVE_AGAIN,
                ) from error
            self.left_out.setdefault(name, f"{column.type}: {first_line(error)}")
            return None


class _ArrowFile:
    """A file of Arrow, with the methods of ``ParquetFile`` that are used here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._opened() as reader:
            self.schema_arrow = reader.schema

    def iter_batches(self, batch_size: int, columns: Sequence[str]) -> Iterator[Any]:
        """Yield the rows in batches; a batch of the file may be larger."""
        with self._opened() as reader:
            parts = (
                reader
                if not hasattr(reader, "get_batch")
                else map(reader.get_batch, range(reader.num_record_batches))
            )
            for part in parts:
                chosen = part.select(list(columns))
                for start in range(0, chosen.num_rows, batch_size):
                    yield chosen.slice(start, batch_size)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open a stream, as datasets writes it, or a file with an index of its batches."""
        from pyarrow import ArrowInvalid, ipc, memory_map

        with memory_map(str(self._path)) as source:
            try:
                reader = ipc.open_stream(source)
            except ArrowInvalid:
                reader = ipc.open_file(source)
            with reader:
                yield reader


def _open(table: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            f"reading {table} needs pyarrow", "run `pipx inject clipft pyarrow`"
        ) from error
    try:
        return _ArrowFile(table) if table.suffix.lower() == ".arrow" else ParquetFile(table)
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {table}: {first_line(error)}", _SAVE_AGAIN) from error


def is_saved_part(path: Path) -> bool:
    """Return whether an Arrow file is a data set, or part of one that ``save_to_disk`` wrote, and
    not a cache file that ``datasets`` left beside it."""
    state = read_json(path.with_name("state.json"))
    if state is None:
        return not path.name.startswith("cache-")
    parts = state.get("_data_files")
    return any(isinstance(at, dict) and at.get("filename") == path.name for at in parts or ())


def saved_split(path: Path) -> str:
    """Return the split that ``save_to_disk`` has noted beside an Arrow file, or ""."""
    state = read_json(path.with_name("state.json")) if path.suffix.lower() == ".arrow" else None
    return str((state or {}).get("_split") or "")


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that ``datasets`` stored in a schema; empty if there are none."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _type_of(feature: object) -> str:
    return str(feature.get("_type")) if isinstance(feature, dict) else ""


def _holds_image(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _named(values: list[Any], feature: object) -> list[Any]:
    """Replace the numbers of class labels by their names; others stay as they are."""
    if isinstance(feature, dict) and _type_of(feature) in {"List", "LargeList", "Sequence"}:
        inner = feature.get("feature")
        return [_named(v, inner) if isinstance(v, list) else v for v in values]
    names = feature.get("names") if isinstance(feature, dict) else None
    if _type_of(feature) != "ClassLabel" or not isinstance(names, list):
        return values
    # datasets writes -1 for an unknown label
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]


def _sample(kind: Any) -> Any:
    """Return an object with the fields of a struct, "" for a value of any other Arrow type."""
    from pyarrow import types

    if not types.is_struct(kind):
        return ""
    return {
        part.name: _sample(part.type) for part in (kind.field(at) for at in range(kind.num_fields))
    }


def holds_bytes(kind: Any) -> bool:
    """Return whether values of this Arrow type are bytes or contain bytes."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if types.is_nested(kind):
        return any(holds_bytes(kind.field(at).type) for at in range(kind.num_fields))
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def values_of(column: Any) -> list[Any]:
    """Return the values of an Arrow array as Python objects.

    Dates and times become ISO text (in UTC if they have a time zone) and durations become seconds.
    They are computed without Python's own types, which are limited to the year 9999 and to
    microseconds, and without pandas or a time zone database, which pyarrow would sometimes need.

    Raises:
        ArrowException, or one of ``_NO_VALUE``: Python cannot hold a value.
    """
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_timestamp(kind) or types.is_date(kind):
        zone = "+00:00" if types.is_timestamp(kind) and kind.tz else ""
        unit = "D" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
        return _iso_texts(column, unit, types.is_date(kind), zone)
    if types.is_duration(kind):
        scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        counts = column.cast(pyarrow.int64()).to_pylist()
        return [None if count is None else count / scale for count in counts]
    if types.is_time64(kind) and kind.unit == "ns":
        column = column.cast(pyarrow.time64("us"), safe=False)
    if types.is_string(kind) or types.is_large_string(kind):
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            wide = column.cast(pyarrow.large_binary()).to_pylist()
            return [None if text is None else text.decode("utf-8", "replace") for text in wide]
    return list(column.to_pylist())


def _iso_texts(column: Any, unit: str, is_date: bool, zone: str) -> list[str | None]:
    import numpy as np
    import pyarrow

    width = pyarrow.int32() if unit == "D" else pyarrow.int64()
    counts = column.cast(width).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    shown = counts.astype(f"datetime64[{unit}]")
    texts = np.datetime_as_string(shown.astype("datetime64[D]") if is_date else shown).tolist()
    return [
        (text.rstrip("0").rstrip(".") if "." in text else text) + zone if valid else None
        for text, valid in zip(texts, column.is_valid().to_pylist(), strict=True)
    ]


def plain_value(value: Any) -> Any:
    """Return ``value`` in a form that strict JSON allows.

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
