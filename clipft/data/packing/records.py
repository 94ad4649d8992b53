"""What packing hands from one step to the next: listed, read, and split."""

from dataclasses import dataclass, field

from clipft.data.duplicates import PerceptualHash
from clipft.data.shards.tar import ByteRange


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture that has words; nothing of it is read yet. ``name`` is to become its key,
    ``where`` is what people know it by, ``image`` a URL until it is fetched."""

    name: str
    where: str
    image: ByteRange | str
    caption: ByteRange | bytes
    metadata: ByteRange | bytes | None


@dataclass
class Listing:
    """What a source holds, and what of it cannot be used as ``{"file", "reason"}``."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, where: object, reason: str) -> None:
        self.skipped.append({"file": str(where), "reason": reason})


@dataclass(frozen=True, slots=True)
class PackPair:
    """One pair: where the picture's bytes lie, its words, and what identifies both.

    ``suffix`` follows from the picture's own header, ``shorter`` is its shorter side in
    pixels, ``photo`` the SHA-256 of its bytes, ``words`` the tidied caption without case,
    ``group`` the value of the metadata's group field, "" where there is none.
    """

    name: str
    where: str
    image: ByteRange
    suffix: str
    shorter: int
    caption: bytes
    metadata: bytes | None
    photo: str
    words: str
    group: str


@dataclass
class Scan:
    """The pairs that can be used, each with its perceptual hash (none where nobody asks), and what
    cannot, as in ``Listing``."""

    pairs: list[PackPair] = field(default_factory=list)
    hashes: list[PerceptualHash | None] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
