"""Which fields the metadata of some pairs has, and whether a caption template names others."""

from typing import Any

from clipft.data.captions.template import CaptionTemplate
from clipft.data.shards.dataset import PairDataset
from clipft.core.errors import UsageError, nearest

_SAMPLED = 256
"""Pairs whose metadata is looked at."""


def check_fields(template: CaptionTemplate, pairs: PairDataset) -> None:
    """
    Raises:
        UsageError: a field of the template stands in none of the pairs that are looked at.
    """
    if not template.fields:
        return
    known = known_fields(pairs)
    for field in template.fields:
        if field not in known:
            near = nearest(field, known)
            raise UsageError(
                f"--caption {template.source!r}: no pair has a field {field!r}",
                (f"did you mean {near}? " if near else "")
                + f"the metadata has {', '.join(sorted(known)) or 'no fields'}",
            )


def known_fields(pairs: PairDataset) -> set[str]:
    """Names, those of objects within with dots."""
    found = set[str]()
    for number in range(0, len(pairs), max(1, len(pairs) // _SAMPLED)):
        found |= _names(pairs.metadata(number))
    return found


def _names(metadata: dict[str, Any], prefix: str = "") -> set[str]:
    found = set[str]()
    for name, value in metadata.items():
        found |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found
