"""Which fields the metadata of some pairs has, and whether a caption template names others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clipft.core.errors import UsageError, did_you_mean
from clipft.data.captions.template import BadCaption, CaptionTemplate, clean_text
from clipft.data.shards.dataset import PairDataset, parse_metadata

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
            raise UsageError(
                f"--caption {template.source!r}: no pair has a field {field!r}",
                fields_hint(field, known),
            )


def known_fields(pairs: PairDataset) -> set[str]:
    """Names, those of objects within with dots."""
    found = set[str]()
    for number in range(0, len(pairs), max(1, len(pairs) // _SAMPLED)):
        found |= _names(pairs.metadata(number))
    return found


def fields_hint(wrong: str, known: set[str]) -> str:
    """Say which fields the metadata has, and which of them ``wrong`` probably means."""
    fields = f"the metadata has {', '.join(sorted(known)) or 'no fields'}"
    return f"{did_you_mean(wrong, known)} {fields}".lstrip()


def _names(metadata: dict[str, Any], prefix: str = "") -> set[str]:
    found = set[str]()
    for name, value in metadata.items():
        found |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


@dataclass(frozen=True)
class Description:
    """Of one pair: the text that it is measured with, and two fields of its metadata."""

    caption: str
    label: str | None
    group: str | None


def describe(
    pairs: PairDataset, template: CaptionTemplate, label_field: str, group_field: str | None
) -> list[Description]:
    """Of every pair, in order.

    Raises:
        UsageError: no pair has the field of the groups.
    """
    found = list(_descriptions(pairs, template, label_field, group_field))
    if group_field and not any(description.group for description in found):
        known = known_fields(pairs)
        raise UsageError(
            f"--group-field {group_field}: no pair has it", fields_hint(group_field, known)
        )
    return found


def _descriptions(
    pairs: PairDataset, template: CaptionTemplate, label_field: str, group_field: str | None
) -> Iterator[Description]:
    for number in range(len(pairs)):
        caption, metadata = pairs.caption_and_metadata(number)
        fields = parse_metadata(metadata)
        try:
            text = template.captions(caption, metadata)[0]
        except BadCaption:  # such a pair is not measured
            text = ""
        group = _text(fields.get(group_field)) if group_field else None
        yield Description(text, _text(fields.get(label_field)), group)


def _text(value: Any) -> str | None:
    """A field as a name; None where it holds none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return clean_text(str(value)) or None
