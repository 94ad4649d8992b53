"""Reads what was listed: each image is hashed, checked and compared, in one pass over its bytes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from clipft.core.text import NotText, decode
from clipft.data.captions.cleaning import compared
from clipft.data.captions.lines import join_lines
from clipft.data.captions.template import BadCaption, CaptionTemplate, split_captions
from clipft.data.duplicates import PerceptualHash, perceptual_hash
from clipft.data.images.decode import open_image
from clipft.data.images.formats import FORMATS, BadImage
from clipft.data.packing.fields import value_of
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing, PackPair, Scan
from clipft.data.packing.worker_pool import Workers
from clipft.data.shards.dataset import parse_metadata
from clipft.data.shards.tar import ByteRange

_CHUNK = 32
# For the perceptual hash, JPEGs are decoded at more than twice this length of the shorter side. At
# 1/8 of 500 pixels the edges of a thumbnail fall between the pixels, and two thirds of the enlarged
# copies of an image are not recognized.
_HASH_SIDE = 96
_MAX_BYTES = 512 << 20
_DEFAULT_CAPTION = "{caption}"


def scan(
    listing: Listing, options: PackOptions, workers: Workers, step: Callable[[int], None]
) -> Scan:
    """Read every candidate; the pairs stay in their order. ``step`` receives the number of
    candidates that were read since the last call."""
    found = Scan(skipped=list(listing.skipped))
    every = listing.candidates
    chunks = [every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK)]
    results = workers.map(partial(_read_chunk, options=options), chunks)
    for chunk, reads in zip(chunks, results, strict=True):
        for candidate, read in zip(chunk, reads, strict=True):
            if isinstance(read, str):
                found.skipped.append({"file": candidate.where, "reason": read})
                continue
            pair, hashed = read
            found.pairs.append(pair)
            found.hashes.append(hashed)
        step(len(chunk))
    return found


def _read_chunk(
    candidates: Sequence[Candidate], options: PackOptions
) -> list[tuple[PackPair, PerceptualHash | None] | str]:
    return [_read(candidate, options) for candidate in candidates]


def _read(
    candidate: Candidate, options: PackOptions
) -> tuple[PackPair, PerceptualHash | None] | str:
    """Read and check a pair; return the reason if it cannot be used."""
    hashed, metadata = None, None
    assert isinstance(candidate.image, ByteRange)
    try:
        caption = _read_text(candidate.caption, "caption", options)
        if candidate.metadata is not None:
            metadata = _read_text(candidate.metadata, "metadata", options)
        # A table's captions are on lines of their own already
        lines = options.caption_lines if isinstance(candidate.caption, ByteRange) else "separate"
        # Without a .txt, its captions may be in the .json beside the image
        composed = options.caption or (_in_metadata(candidate) and _DEFAULT_CAPTION)
        if composed:
            captions = _parsed(composed, lines).captions(caption, metadata or b"")
        else:
            captions = split_captions(caption, lines)
        if not captions:
            raise BadCaption("empty caption")
        if composed or lines == "joined":
            caption = join_lines(captions)
        data = candidate.image.read(_MAX_BYTES)
        image = open_image(data)
        if options.near >= 0:  # this decode also finds whatever --check would find
            hashed = perceptual_hash(image.decode(at_least=_HASH_SIDE))
        elif options.check:
            image.decode()
        else:
            image.verify()
    except BadCaption as error:
        missing = _in_metadata(candidate) and not options.caption
        return "no caption" if missing else str(error)
    except BadImage as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in a name
        return "no such file"
    except OSError as error:
        return error.strerror or type(error).__name__
    fields = options.group_field, options.label_field
    known = parse_metadata(metadata or b"") if any(fields) else {}
    group, label = (value_of(known, field) for field in fields)
    pair = PackPair(
        name=candidate.name,
        where=candidate.where,
        image=replace(candidate.image, size=len(data)),
        suffix=FORMATS[image.format][0],
        shorter_side=min(image.size),
        caption=caption,
        metadata=metadata,
        image_hash=hashlib.sha256(data).hexdigest(),
        caption_keys=tuple(dict.fromkeys(map(compared, captions))),
        group=group,
        label=label,
        split=candidate.split,
    )
    return pair, hashed


def _read_text(source: ByteRange | bytes, what: str, options: PackOptions) -> bytes:
    """Read a caption or metadata as UTF-8 without a byte-order mark.

    Raises:
        BadCaption: It is not text.
        OSError: It cannot be read.
    """
    if isinstance(source, bytes):  # from a table, whose reader decoded it
        return source
    try:
        return decode(source.read(), options.encoding or None).encode()
    except NotText as error:
        raise BadCaption(f"the {what} is {error}") from error


def _in_metadata(candidate: Candidate) -> bool:
    """True if there is no .txt, but a file of metadata that may have captions."""
    return candidate.caption == b"" and isinstance(candidate.metadata, ByteRange)


_parsed = cache(CaptionTemplate.parse)
