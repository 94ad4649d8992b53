"""The rows of the tables: one for each image, or one for each caption."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.shards.dataset import RawPair
from clipft.data.shards.metadata import parse_metadata
from clipft.search.images import ImagePart
from clipft.search.tables.columns import Fields, add_kinds


@dataclass(frozen=True)
class Row:
    """A row without its vector. ``sha256`` is the hash of the bytes of the image file, or of the
    caption in UTF-8. ``fields`` are the metadata of the pair."""

    key: str
    caption: str | None
    fields: dict[str, Any]
    sha256: str


@dataclass
class Rows:
    """The rows of a part.

    ``skipped`` are images that cannot be decoded, as ``{"key", "split", "reason"}``.
    """

    part: ImagePart
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def image_row(pair: RawPair, template: CaptionTemplate) -> Row:
    """Return the row of an image; its caption is the first of several."""
    captions, metadata = _captions(pair, template), parse_metadata(pair.metadata)
    return Row(_key(pair), next(captions, None), metadata, hashlib.sha256(pair.image).hexdigest())


def text_rows(pair: RawPair, template: CaptionTemplate) -> Iterator[Row]:
    """Yield a row for each caption of a pair."""
    metadata = parse_metadata(pair.metadata)
    for caption in _captions(pair, template):
        yield Row(_key(pair), caption, metadata, hashlib.sha256(caption.encode()).hexdigest())


def fields_of(part: ImagePart) -> Fields:
    """Return the kinds of all fields in a part."""
    fields: Fields = {}
    for number in range(part.count):
        add_kinds(fields, parse_metadata(part.read_texts(number).metadata))
    return fields


def _captions(pair: RawPair, template: CaptionTemplate) -> Iterator[str]:
    try:
        captions = template.captions(pair.caption, pair.metadata)
    except BadCaption:  # an image does not need a caption
        return
    yield from (caption.encode("utf-8", "replace").decode() for caption in captions)


def _key(pair: RawPair) -> str:
    """Return the key as valid Unicode. It may be a file name with other bytes."""
    return pair.key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
