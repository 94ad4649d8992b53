"""Checks that the metadata has the fields that options name, before anything is written."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clipft.data.captions.fields import field_names, field_value, unknown_field
from clipft.data.captions.template import CaptionTemplate, clean_text
from clipft.data.packing.options import PackOptions


def check_fields(options: PackOptions, metadata: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
    """Check the fields of --group-field, --label-field and --caption.

    Each call of ``metadata`` returns a new iterator over all pairs.

    Raises:
        UsageError: No pair has one of the fields; the hint names the closest existing field.
    """
    chosen = {"--group-field": options.group_field, "--label-field": options.label_field}
    named = [(option, field) for option, field in chosen.items() if field]
    if options.caption:
        fields = CaptionTemplate.parse(options.caption).fields
        named += [(f"--caption {options.caption!r}", field) for field in fields]
    for option, field in named:
        known = dict[str, None]()
        for pair in metadata():  # usually the first pair has it
            value = field_value(pair, field)
            if value is not None and not isinstance(value, dict):
                break
            known.update(dict.fromkeys(field_names(pair)))
        else:
            raise unknown_field(option, field, known)


def value_of(metadata: Mapping[str, Any], field: str) -> str:
    """Return the group or label that a pair has in a field, "" if it has none."""
    value = field_value(metadata, field) if field else None
    # NFC, so that composed and decomposed accents give the same name
    return "" if value is None else unicodedata.normalize("NFC", clean_text(str(value)))
