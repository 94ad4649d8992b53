"""What is said of the pairs of a validation set: captions, labels, groups, and which photos
are one file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipft.data.captions.metadata import known_fields
from clipft.data.captions.template import CaptionTemplate, parse_metadata
from clipft.data.captions import BadCaption, clean_text
from clipft.data.overlap import picture_hashes, picture_sizes
from clipft.data.shards.dataset import PairDataset
from clipft.core.errors import UsageError, nearest


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
        near = nearest(group_field, known)
        raise UsageError(
            f"--group-field {group_field}: no pair has it",
            (f"did you mean {near}? " if near else "")
            + f"the metadata has {', '.join(sorted(known)) or 'no fields'}",
        )
    return found


def _descriptions(
    pairs: PairDataset, template: CaptionTemplate, label_field: str, group_field: str | None
) -> Iterator[Description]:
    for number in range(len(pairs)):
        caption, metadata = pairs.words(number)
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


def same_photos(pairs: PairDataset) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """int64 [N]: equal numbers for pictures that are equal byte for byte.

    The index knows the pictures' sizes: only those of equal size are read.
    """
    sizes = picture_sizes(pairs)
    _, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    numbers = np.arange(len(pairs))
    doubtful: Sequence[int] = np.flatnonzero(counts[which] > 1).tolist()
    first: dict[bytes, int] = {}
    for number, digest in zip(doubtful, picture_hashes(pairs, doubtful), strict=True):
        numbers[number] = first.setdefault(digest, number)
    return numbers
