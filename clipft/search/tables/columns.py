"""The columns that the fields of the metadata become, in the whole data set alike.

Each field has one kind: ``bool``, ``int``, ``float`` or ``text``. A field whose values differ in
kind is text, and so are lists and objects, as JSON.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FIXED = ("key", "split", "caption", "sha256", "vector")
"""The columns that every table has besides those of the fields."""

Fields = dict[str, str]
"""The kind of each field."""

_MOST = 500
"""Columns for fields. Metadata with more has names that are values, such as product numbers."""
_INT64 = 1 << 63


class Column(NamedTuple):
    name: str
    kind: str


def add_kinds(fields: Fields, metadata: Mapping[str, Any]) -> None:
    """Let ``fields`` hold the values of ``metadata`` as well."""
    for name, value in metadata.items():
        if value is not None:
            fields[name] = _common(fields.get(name), _kind_of(value))


def merged(several: Iterable[Fields]) -> Fields:
    """Return fields that hold all values that each of ``several`` can hold."""
    found: Fields = {}
    for fields in several:
        for name, kind in fields.items():
            found[name] = _common(found.get(name), kind)
    return found


def columns_of(fields: Fields) -> dict[str, Column]:
    """Return the column of each field, in the order of their names; at most ``_MOST``."""
    taken, columns = {name.casefold() for name in FIXED}, dict[str, Column]()
    for field in sorted(fields)[:_MOST]:
        # Lance has no dots in names, and DuckDB takes Color and color for the same column
        plain = field.replace(".", "_").encode("utf-8", "replace").decode().strip() or "field"
        name = f"field_{plain}" if plain.casefold() in taken else plain
        while name.casefold() in taken:
            name += "_"
        taken.add(name.casefold())
        columns[field] = Column(name, fields[field])
    return columns


def converted(value: Any, kind: str) -> Any:
    """Return a value as its column holds it."""
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
