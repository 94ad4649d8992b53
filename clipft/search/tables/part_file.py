"""A Parquet file with the embeddings of one part of a data set.

``vector`` is the only column of vectors, because Lance searches the column of this name. It is a
list of fixed size, which all libraries can turn into a matrix without a copy. Images and captions
are two tables, because an image may have several captions or none, and a search wants rows of one
kind. The columns are

    key, split, caption    as in the data set
    ...                    the fields of the pair's metadata
    sha256                 of the image file or the caption, to find equal rows
    vector                 fixed_size_list<float32 or float16>[dim]

The metadata of the schema have two JSON objects: ``clipft`` says how the vectors were made, and
``clipft.part`` from which state of the data.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipft.core.files import replacing
from clipft.search.tables.columns import Fields, converted
from clipft.search.tables.rows import Rows
from clipft.search.vectors import Vectors

if TYPE_CHECKING:
    import pyarrow

_MADE_WITH, _PART = b"clipft", b"clipft.part"


@dataclass(frozen=True)
class VectorFormat:
    """How vectors are stored: their first ``dim`` dimensions, as ``dtype`` (float16 or float32)."""

    dim: int
    dtype: str

    def stored(self, vectors: Vectors) -> "np.ndarray[Any, Any]":
        """Return unit vectors [N, D] as they are stored: [N, dim], again of unit length."""
        kept = vectors[:, : self.dim]
        if self.dim < vectors.shape[1]:
            kept = kept / np.linalg.norm(kept, axis=1, keepdims=True)
        return kept.astype(self.dtype)


@dataclass(frozen=True)
class About:
    """The description of a part that its file contains.

    Attributes:
        made: A hash of the model and the options that made the vectors.
        state: The state of the data that the file was made from.
        fields: The kinds of the fields in this part.
        columns: The column of each field in the whole data set, as (name, kind).
        skipped: As in ``Rows``.
    """

    made: str
    state: str
    fields: Fields
    columns: dict[str, list[str]]
    skipped: list[dict[str, str]]


def write_part(
    path: Path,
    rows: Rows,
    vectors: Mapping[str, "np.ndarray[Any, Any]"],
    about: About,
    made_with: Mapping[str, Any],
) -> None:
    """Write the rows of a part with their vectors, which are given by ``sha256``.

    Raises:
        StorageError: The disk is full, or refuses to write.
    """
    from pyarrow import parquet

    table = _table(rows, vectors, about.columns, made_with).replace_schema_metadata(
        {_MADE_WITH: json.dumps(made_with), _PART: json.dumps(asdict(about))}
    )
    repeated = [name for name in table.column_names if name not in ("key", "sha256", "vector")]
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd", use_dictionary=repeated)


def _table(
    rows: Rows,
    vectors: Mapping[str, "np.ndarray[Any, Any]"],
    columns: Mapping[str, list[str]],
    made_with: Mapping[str, Any],
) -> "pyarrow.Table":
    import pyarrow

    types = {
        "bool": pyarrow.bool_(),
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "text": pyarrow.string(),
    }
    text, listed, dim = pyarrow.string(), rows.rows, int(made_with["dim"])
    named = {
        "key": pyarrow.array([row.key for row in listed], text),
        "split": pyarrow.array([rows.part.split or None] * len(listed), text),
        "caption": pyarrow.array([row.caption for row in listed], text),
    }
    for field, (name, kind) in columns.items():
        values = [converted(row.fields.get(field), kind) for row in listed]
        named[name] = pyarrow.array(values, types[kind])
    named["sha256"] = pyarrow.array([row.sha256 for row in listed], text)
    flat = np.empty((len(listed), dim), made_with["dtype"])
    for place, row in enumerate(listed):
        flat[place] = vectors[row.sha256]
    named["vector"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.ravel()), dim)
    return pyarrow.table(named)


def read_about(path: Path) -> About | None:
    """Return the description in a file; None if the file is missing or damaged."""
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
        return About(**json.loads(metadata[_PART]))
    except (OSError, ArrowException, KeyError, ValueError, TypeError):
        return None


def count_rows(path: Path) -> int:
    """Return the number of rows in a file."""
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def read_vectors(path: Path) -> "tuple[list[str], np.ndarray[Any, Any]]":
    """Return the column ``sha256`` and the vectors [N, dim] of a file.

    Raises:
        OSError, ArrowException: The file is damaged.
    """
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["sha256", "vector"])
    vectors = table["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    return table["sha256"].to_pylist(), flat.reshape(len(table), vectors.type.list_size)
