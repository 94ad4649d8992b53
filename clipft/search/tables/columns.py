"""The columns for the fields of the metadata, which are the same in the whole data set.

Each field has one kind: ``bool``, ``int``, ``float`` or ``text``. A field with values of different
kinds is text. Lists and objects are stored as JSON text.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FIXED = ("key", "split", "caption", "sha256", "vector")
"""The columns of every table that are not fields of the metadata."""

Fields = dict[str, str]
"""The kind of each field."""

_MOST = 500
"""The most columns for fields. If metadata has more, its names are probably values, such as product
numbers."""
_INT64 = 1 << 63


class Column(NamedTuple):
    name: str
    kind: str


def add_kinds(fields: Fields, metadata: Mapping[str, Any]) -> None:
    """Widen the kinds in ``fields`` so that they can hold the values of ``metadata``."""
    for name, value in metadata.items():
        if value is not None:
            fields[name] = _common(fields.get(name), _kind_of(value))


def merged(several: Iterable[Fields]) -> Fields:
    """Return the fields with kinds that can hold the values of all ``several``."""
    found: Fields = {}
    for fields in several:
        for name, kind in fields.items():
            found[name] = _common(found.get(name), kind)
    return found


def columns_of(fields: Fields) -> dict[str, Column]:
    """Return the column of each field, in the order of their names; at most ``_MOST``."""
    taken, columns = {name.casefold() for name in FIXED}, dict[str, Column]()
    for field in sorted(fields)[:_MOST]:
        # Lance does not allow dots in names, and Color and color are the same column in DuckDB
        plain = field.replace(".", "_").encode("utf-8", "replace").decode().strip() or "field"
        name = f"field_{plain}" if plain.casefold() in taken else plain
        while name.casefold() in taken:
            name += "_"
        taken.add(name.casefold())
        columns[field] = Column(name, fields[field])
    return columns


def converted(value: Any, kind: str) -> Any:
    """Convert a value to the kind of its column."""
    if value is None:
        return None
    if kind == "float":
        return float(value)
    if kind != "text":
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -_INT64 <= value < _INT64 else "text"
    return "float" if isinstance(value, float) else "text"


def _common(one: str | None, other: str) -> str:
    if one is None or one == other:
        return other
    return "float" if {one, other} == {"int", "float"} else "text"
