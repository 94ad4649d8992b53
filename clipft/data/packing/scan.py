"""Reading what was listed: each picture is hashed, verified and looked at, once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from clipft.data.captions.template import BadCaption, clean_caption
from clipft.data.duplicates import PerceptualHash, perceptual_hash
from clipft.data.images import BadImage, decode_opened, open_image, verify_opened
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing, PackPair, Scan
from clipft.data.packing.worker_pool import Workers
from clipft.data.shards.dataset import parse_metadata
from clipft.data.shards.tar import ByteRange

_CHUNK = 32
_LOOK_SIDE = 96
"""JPEGs are looked at from a decode above twice that: at 1/8 of 500 pixels a thumbnail's edges
fall between the pixels, and two thirds of the enlarged copies of a photo are not recognised."""
_MAX_BYTES = 512 << 20
_SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
"""Pillow's names of the formats, and what their members are called."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What reading a candidate adds to it."""

    caption: bytes
    metadata: bytes | None
    words: str
    group: str
    picture: "_Picture"


@dataclass(frozen=True, slots=True)
class _Picture:
    size: int
    photo: str
    suffix: str
    shorter: int
    perceptual_hash: PerceptualHash | None


def scan(
    listing: Listing, options: PackOptions, workers: Workers, step: Callable[[int], None]
) -> Scan:
    """Read every candidate, in its order; ``step`` is told of so many more."""
    found = Scan(skipped=list(listing.skipped))
    every = listing.candidates
    chunks = [every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK)]
    results = workers.map(partial(_read_all, options=options), chunks)
    for chunk, reads in zip(chunks, results, strict=True):
        for candidate, read in zip(chunk, reads, strict=True):
            if isinstance(read, str):
                found.skipped.append({"file": candidate.where, "reason": read})
            else:
                found.pairs.append(_pair(candidate, read))
                found.hashes.append(read.picture.perceptual_hash)
        step(len(chunk))
    return found


def _pair(candidate: Candidate, read: _Read) -> PackPair:
    assert isinstance(candidate.image, ByteRange)
    picture = read.picture
    return PackPair(
        candidate.name,
        candidate.where,
        replace(candidate.image, size=picture.size),
        picture.suffix,
        picture.shorter,
        read.caption,
        read.metadata,
        picture.photo,
        read.words,
        read.group,
    )


def _read_all(candidates: Sequence[Candidate], options: PackOptions) -> list[_Read | str]:
    return [_read(candidate, options) for candidate in candidates]


def _read(candidate: Candidate, options: PackOptions) -> _Read | str:
    """What is in it, or why it cannot be used."""
    assert isinstance(candidate.image, ByteRange)
    try:
        caption, metadata = _bytes(candidate.caption) or b"", _bytes(candidate.metadata)
        words = clean_caption(caption).casefold()
        picture = _picture(candidate.image.read(_MAX_BYTES), options)
    except (BadCaption, BadImage) as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL in a name
        return "no such file"
    except OSError as error:
        return error.strerror or type(error).__name__
    group = (
        parse_metadata(metadata or b"").get(options.group_field) if options.group_field else None
    )
    return _Read(caption, metadata, words, "" if group is None else str(group), picture)


def _bytes(value: ByteRange | bytes | None) -> bytes | None:
    return value.read() if isinstance(value, ByteRange) else value


def _picture(data: bytes, options: PackOptions) -> _Picture:
    """
    Raises:
        BadImage: it is broken as far as was looked: decoded, or its header read.
    """
    image, hashed = open_image(data), None
    kind, shorter = image.format or "?", min(image.size)
    if kind not in _SUFFIXES:
        raise BadImage(f"{kind} is no format that shards hold: make it JPEG or PNG")
    if options.near >= 0:  # which also finds what a full decode finds broken
        hashed = perceptual_hash(decode_opened(image, at_least=_LOOK_SIDE))
    elif options.check:
        decode_opened(image)
    else:
        verify_opened(image)
    photo = hashlib.sha256(data).hexdigest()
    return _Picture(len(data), photo, _SUFFIXES[kind], shorter, hashed)
