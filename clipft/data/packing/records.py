"""The records that the steps of packing pass on."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from clipft.data.duplicates import PerceptualHash
from clipft.data.shards.contents import Contents
from clipft.data.shards.tar import ByteRange


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image with a caption, as the source lists it, before either is read.

    ``name`` becomes the key in a shard, ``where`` is the name in messages, and ``image`` is a URL
    until the image is downloaded. ``split`` is the split that the source gives, or "".
    """

    name: str
    where: str
    image: ByteRange | str
    caption: ByteRange | bytes
    metadata: ByteRange | bytes | None
    split: str = ""


@dataclass
class Listing:
    """What was found in a source: the pairs, the skipped files as ``{"file", "reason"}``, all other
    files, and notes for the user about how the source was read."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    others: Contents = field(default_factory=Contents)
    notes: list[str] = field(default_factory=list)

    def skip(self, where: object, reason: str) -> None:
        self.skipped.append({"file": str(where), "reason": reason})


@dataclass(frozen=True, slots=True)
class PackPair:
    """A pair whose image and caption were read and can be used.

    ``suffix`` is that of the image's real format, not of its file name; ``shorter_side`` is in
    pixels. ``image_hash`` is the SHA-256 of the image's bytes and ``caption_keys`` the cleaned,
    case-folded captions: pairs that share one of these stay in the same split, as do pairs with the
    same ``group``, the value of --group-field ("" without one). With a ``label``, the value of
    --label-field, a pair may share its captions with another split. ``split`` is as in
    ``Candidate``.
    """

    name: str
    where: str
    image: ByteRange
    suffix: str
    shorter_side: int
    caption: bytes
    metadata: bytes | None
    image_hash: str
    caption_keys: tuple[str, ...]
    group: str
    label: str
    split: str = ""


@dataclass
class Scan:
    """The usable pairs, each with its perceptual hash (None with --near -1), and what was skipped
    while listing and reading, as in ``Listing``."""

    pairs: list[PackPair] = field(default_factory=list)
    hashes: list[PerceptualHash | None] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def count_reasons(skipped: Iterable[dict[str, str]]) -> dict[str, int]:
    """Count skipped files by reason, without details in parentheses such as "truncated (7 bytes not
    processed)"."""
    return dict(Counter(entry["reason"].partition(" (")[0] for entry in skipped))
