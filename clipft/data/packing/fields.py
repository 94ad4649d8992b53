"""Checks that the fields of the metadata which options name exist, before anything is written."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clipft.data.captions.fields import field_names, field_value, unknown_field
from clipft.data.captions.template import CaptionTemplate, clean_text
from clipft.data.packing.options import PackOptions


def check_fields(options: PackOptions, metadata: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
    """Check the fields of --group-field and --caption; ``metadata`` starts with the first pair
    again each time it is called.

    Raises:
        UsageError: No pair has one of them; the hint names the closest field that there is.
    """
    named = [("--group-field", options.group_field)] if options.group_field else []
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


def group_of(metadata: Mapping[str, Any], field: str) -> str:
    """Return the value by which a pair is grouped, "" if it has none."""
    value = field_value(metadata, field)
    # Composed, so that a name is one name however its accents are encoded
    return "" if value is None else unicodedata.normalize("NFC", clean_text(str(value)))
