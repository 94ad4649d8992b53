"""The fields of the pairs' metadata, and what an evaluation needs to know of each pair."""

from dataclasses import dataclass

from clipft.core.errors import UsageError, did_you_mean
from clipft.data.captions.template import BadCaption, CaptionTemplate, clean_text
from clipft.data.shards.dataset import PairDataset, parse_metadata

_SAMPLED = 256
"""The number of pairs whose metadata is looked at."""


def known_fields(pairs: PairDataset) -> set[str]:
    """Return the fields that a sample of the metadata has; ``a.b`` is a field in an object."""
    found = set[str]()
    for number in range(0, len(pairs), max(1, len(pairs) // _SAMPLED)):
        objects = [("", pairs.metadata(number))]
        while objects:
            prefix, metadata = objects.pop()
            for name, value in metadata.items():
                if isinstance(value, dict):
                    objects.append((f"{prefix}{name}.", value))
                else:
                    found.add(prefix + name)
    return found


def fields_hint(wrong: str, known: set[str]) -> str:
    """Say which fields the metadata has, and which of them ``wrong`` probably means."""
    fields = f"the metadata has {', '.join(sorted(known)) or 'no fields'}"
    return f"{did_you_mean(wrong, known)} {fields}".lstrip()


def unknown_field(option: str, field: str, known: set[str]) -> UsageError:
    """Make the error for an option that names a field which no pair has."""
    return UsageError(f"{option}: no pair has a field {field!r}", fields_hint(field, known))


def check_fields(template: CaptionTemplate, pairs: PairDataset) -> None:
    """Check the fields that a template names against a sample of the metadata.

    Raises:
        UsageError: None of these pairs has one of the fields.
    """
    known = known_fields(pairs) if template.fields else set[str]()
    for field in template.fields:
        if field not in known:
            raise unknown_field(f"--caption {template.source!r}", field, known)


@dataclass(frozen=True)
class Description:
    """The caption that a pair is evaluated with, and two fields of its metadata.

    The caption is "" for a pair that has none and is therefore skipped.
    """

    caption: str
    label: str | None
    group: str | None


def describe(
    pairs: PairDataset, template: CaptionTemplate, label_field: str, group_field: str | None
) -> list[Description]:
    """Describe every pair, in order.

    Raises:
        UsageError: No pair has ``group_field``.
    """
    found = []
    for number in range(len(pairs)):
        caption, metadata = pairs.caption_and_metadata(number)
        fields, names = parse_metadata(metadata), list[str | None]()
        try:
            text = template.captions(caption, metadata)[0]
        except BadCaption:
            text = ""
        for field in (label_field, group_field):
            value = fields.get(field) if field else None
            named = isinstance(value, str | int | float) and not isinstance(value, bool)
            names.append((clean_text(str(value)) or None) if named else None)
        found.append(Description(text, *names))
    if group_field and not any(description.group for description in found):
        raise unknown_field("--group-field", group_field, known_fields(pairs))
    return found
