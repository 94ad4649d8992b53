"""The fields of the pairs' metadata: how a name finds its value, and which names there are.

Everything that takes the name of a field (``--caption``, ``--group-field``, ``--label-field``)
reads it here, so the same name means the same field everywhere.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from clipft.core.errors import UsageError, did_you_mean, sentences

_SAMPLED = 256
"""The number of pairs whose metadata is read to list the fields."""
_LISTED = 20


class WithMetadata(Protocol):
    """Pairs that can be asked for their metadata by number."""

    def __len__(self) -> int: ...

    def metadata(self, number: int, /) -> dict[str, Any]: ...


def field_value(metadata: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None if the metadata does not have it.

    ``product.id`` is the field with exactly this name (such as a column of a table) or, if there
    is none, the field ``id`` of the object ``product``. Letters with an accent match whether they
    are composed or decomposed.
    """
    if name in metadata:
        return metadata[name]
    at = name.rfind(".")
    while at > 0:
        inner = field_value(metadata, name[:at])
        if isinstance(inner, dict):
            value = field_value(inner, name[at + 1 :])
            if value is not None:
                return value
        at = name.rfind(".", 0, at)
    if not name.isascii():
        wanted = unicodedata.normalize("NFC", name)
        for key, value in metadata.items():
            if unicodedata.normalize("NFC", key) == wanted:
                return value
    return None


def field_names(metadata: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of all fields. Fields of an object are written ``object.field``."""
    for name, value in metadata.items():
        if isinstance(value, dict):
            yield from field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def known_fields(pairs: WithMetadata) -> set[str]:
    """Return the fields that a sample of the metadata has."""
    sample = range(0, len(pairs), max(1, len(pairs) // _SAMPLED))
    return {name for number in sample for name in field_names(pairs.metadata(number))}


def has_field(pairs: WithMetadata, name: str) -> bool:
    """Return whether any pair has a value in the field. Objects do not count: they have no text."""
    for number in range(len(pairs)):  # usually the first pair has it
        value = field_value(pairs.metadata(number), name)
        if value is not None and not isinstance(value, dict):
            return True
    return False


def fields_hint(wrong: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known fields, and the one that ``wrong`` probably means."""
    names = sorted(known)
    if not names:
        return (
            "the pairs have no metadata: add a .json file beside each image, or pack a table that "
            "has this column"
        )
    listed = ", ".join(names[:_LISTED])
    if len(names) > _LISTED:
        listed += f" and {len(names) - _LISTED:,} more"
    return sentences(did_you_mean(wrong, names), f"the metadata has {listed}")


def unknown_field(option: str, field: str, known: Iterable[str]) -> UsageError:
    """Make the error for an option that names a field which no pair has."""
    return UsageError(f"{option}: no pair has a field {field!r}", fields_hint(field, known))


def check_field(option: str, field: str, pairs: WithMetadata) -> None:
    """Check that a field named by the user exists.

    Raises:
        UsageError: No pair has it; the hint names the closest existing field.
    """
    if not has_field(pairs, field):
        raise unknown_field(option, field, known_fields(pairs))
