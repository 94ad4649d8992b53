"""Reading what was listed: each picture is hashed, verified and looked at, once."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image, UnidentifiedImageError

from clipft.data.blob import Blob
from clipft.data.captions import BadCaption, clean_caption
from clipft.data.images import BadImage, decode_image
from clipft.data.likeness import THUMBNAIL, Look, look_of
from clipft.data.pack_options import PackOptions
from clipft.data.pack_records import Candidate, Listing, PackPair, Scan
from clipft.data.processes import Workers
from clipft.data.shard_index import metadata_fields

_CHUNK = 32
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

_Read = tuple[PackPair, Look | None] | str


@dataclass(frozen=True)
class _Picture:
    suffix: str
    shorter: int
    look: Look | None


def scan(
    listing: Listing, options: PackOptions, workers: Workers, step: Callable[[int], None]
) -> Scan:
    """Read every candidate, in its order; ``step`` is told of so many more."""
    found = Scan(skipped=list(listing.skipped))
    every = listing.candidates
    chunks = [every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK)]
    for chunk, results in zip(
        chunks, workers.map(partial(_read_all, options=options), chunks), strict=True
    ):
        for candidate, result in zip(chunk, results, strict=True):
            if isinstance(result, str):
                found.skipped.append({"file": candidate.where, "reason": result})
            else:
                found.pairs.append(result[0])
                found.looks.append(result[1])
        step(len(chunk))
    return found


def _read_all(candidates: Sequence[Candidate], options: PackOptions) -> list[_Read]:
    return [_read(candidate, options) for candidate in candidates]


def _read(candidate: Candidate, options: PackOptions) -> _Read:
    """The pair, or why it cannot be used."""
    assert isinstance(candidate.image, Blob)
    try:
        caption, metadata = _bytes(candidate.caption) or b"", _bytes(candidate.metadata)
        words = clean_caption(caption).casefold()
        data = candidate.image.read(_MAX_BYTES)
        picture = _picture(data, options)
    except (BadCaption, BadImage) as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL in a name
        return "no such file"
    except OSError as error:
        return error.strerror or type(error).__name__
    group = metadata_fields(metadata).get(options.group_field) if options.group_field else None
    pair = PackPair(
        candidate.name,
        candidate.where,
        replace(candidate.image, size=len(data)),
        picture.suffix,
        picture.shorter,
        caption,
        metadata,
        hashlib.sha256(data).hexdigest(),
        words,
        "" if group is None else str(group),
    )
    return pair, picture.look


def _bytes(value: Blob | bytes | None) -> bytes | None:
    return value.read() if isinstance(value, Blob) else value


def _picture(data: bytes, options: PackOptions) -> _Picture:
    """Format, size and look.

    Raises:
        BadImage: it is broken as far as was looked: decoded, or its header read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, shorter = image.format or "?", min(image.size)
            if options.near < 0 and not options.check:
                image.verify()
    except Exception as error:  # Pillow's plug-ins raise whatever they like
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(reason or type(error).__name__) from error
    if kind not in _SUFFIXES:
        raise BadImage(f"{kind} is no format that shards hold: make it JPEG or PNG")
    look = None
    if options.near >= 0:  # a JPEG at an eighth of its size: half the time, the same faults
        look = look_of(decode_image(data, at_least=THUMBNAIL))
    elif options.check:
        decode_image(data)
    return _Picture(_SUFFIXES[kind], shorter, look)
