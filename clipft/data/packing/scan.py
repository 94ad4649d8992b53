"""Reads, checks and hashes the images and captions that were listed.

The parts of a pack (``--part I/N``) share this step. All parts divide the list into the same
pieces, and a part skips a piece that another part has read or is reading. The results are stored in
a folder that all parts can access. The parts need not run at the same time: a part that runs alone
reads all pieces.
"""

import fcntl
import hashlib
import json
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from clipft import __version__
from clipft.core.files import write_json
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
from clipft.data.shards.metadata import parse_metadata
from clipft.data.shards.tar import ByteRange

_CHUNK = 32
# For the perceptual hash, a JPEG is decoded with more than twice this many pixels on the shorter
# side. At 1/8 of 500 pixels the edges of a thumbnail fall between the pixels, and two thirds of the
# enlarged copies of an image are not recognized.
_HASH_SIDE = 96
_MAX_BYTES = 512 << 20
_DEFAULT_CAPTION = "{caption}"
# Candidates in the largest piece that a part of a pack takes at a time
_PIECE = 2048
# Seconds between two checks whether other parts have finished
_WAIT = 0.2

Read = tuple[PackPair, PerceptualHash | None] | str
"""A pair with its perceptual hash, or the reason why it cannot be used."""
Reader = Callable[[Sequence[Candidate]], Iterator[Read]]


def scan(
    listing: Listing,
    options: PackOptions,
    workers: Workers,
    step: Callable[[int], None],
    shared: Path,
) -> Scan:
    """Read every candidate. The pairs keep their order.

    ``step`` receives the number of candidates that were read since the last call. The parts of a
    pack exchange their results in the folder ``shared``.
    """
    found = Scan(skipped=list(listing.skipped))
    every = listing.candidates

    def read(candidates: Sequence[Candidate]) -> Iterator[Read]:
        starts = range(0, len(candidates), _CHUNK)
        chunks = [candidates[start : start + _CHUNK] for start in starts]
        for reads in workers.map(partial(_read_chunk, options=options), chunks):
            yield from reads
            step(len(reads))

    whole = options.part.of == 1
    reads = read(every) if whole else _read_shared(every, options, read, step, shared)
    for candidate, found_one in zip(every, reads, strict=True):
        if isinstance(found_one, str):
            found.skipped.append({"file": candidate.where, "reason": found_one})
            continue
        pair, hashed = found_one
        found.pairs.append(pair)
        found.hashes.append(hashed)
    return found


def _read_shared(
    every: Sequence[Candidate],
    options: PackOptions,
    read: Reader,
    step: Callable[[int], None],
    shared: Path,
) -> Iterator[Read]:
    """Read the pieces that no other part reads, this part's own first; yield all parts' results."""
    size = min(_PIECE, max(_CHUNK, -(-len(every) // (4 * options.part.of))))
    pieces = [every[start : start + size] for start in range(0, len(every), size)]
    state = cache(_state)
    files = [shared / f"scan-{_fingerprint(piece, options, state)}.json" for piece in pieces]
    left = sorted(range(len(pieces)), key=lambda number: not options.part.has(number))
    while left:
        others = []
        for number in left:
            file, piece = files[number], pieces[number]
            with _claim(file.with_suffix(".lock")) as claimed:
                if file.exists():
                    step(len(piece))
                elif claimed:
                    write_json(file, list(map(_to_json, read(piece))), shared=True)
                else:
                    others.append(number)
        if len(others) == len(left):
            time.sleep(_WAIT)
        left = others
    for file, piece in zip(files, pieces, strict=True):
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # removed by somebody, or damaged
            yield from read(piece)
        else:
            yield from map(_from_json, piece, entries)


@contextmanager
def _claim(lock: Path) -> Iterator[bool]:
    """Hold a lock during the block, and yield whether this process got it.

    The system releases the lock even if the process is killed. A file system without locks is not
    an error: two processes may then read the same piece, which only costs time.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        claimed = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claimed = False
        except OSError:
            pass
        yield claimed
    finally:
        os.close(descriptor)


def _fingerprint(
    piece: Sequence[Candidate], options: PackOptions, state: Callable[[str], object]
) -> str:
    """Return a hash of everything that the result of reading a piece depends on."""
    decide = {"near", "check", "encoding", "caption", "caption_lines", "group_field", "label_field"}
    digest = hashlib.sha256(f"{__version__} {options.model_dump_json(include=decide)}".encode())
    for candidate in piece:
        for place in (candidate.image, candidate.caption, candidate.metadata):
            at = (place, state(place.path)) if isinstance(place, ByteRange) else place
            digest.update(repr(at).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _state(path: str) -> object:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return None
    return found.st_size, found.st_mtime_ns


_BYTES = ("caption", "metadata")
_FOUND = ("suffix", "shorter_side", "image_hash", "caption_keys", "group", "label")


def _to_json(read: Read) -> Any:
    """Return the fields of a pair that its candidate does not have yet."""
    if isinstance(read, str):
        return read
    pair, hashed = read
    entry = {name: getattr(pair, name) for name in _FOUND} | {"size": pair.image.size}
    for name in _BYTES:
        held = getattr(pair, name)
        entry[name] = None if held is None else b64encode(held).decode()
    if hashed:
        entry["hash"], entry["thumbnail"] = hashed.hash, b64encode(hashed.thumbnail).decode()
    return entry


def _from_json(candidate: Candidate, entry: Any) -> Read:
    """The reverse of ``_to_json``."""
    if isinstance(entry, str):
        return entry
    assert isinstance(candidate.image, ByteRange)
    held = {name: entry[name] for name in _FOUND}
    held |= {name: None if entry[name] is None else b64decode(entry[name]) for name in _BYTES}
    held["caption_keys"] = tuple(entry["caption_keys"])
    image = replace(candidate.image, size=entry["size"])
    pair = PackPair(
        name=candidate.name, where=candidate.where, image=image, split=candidate.split, **held
    )
    if "hash" not in entry:
        return pair, None
    return pair, PerceptualHash(entry["hash"], b64decode(entry["thumbnail"]))


def _read_chunk(candidates: Sequence[Candidate], options: PackOptions) -> list[Read]:
    return [_read(candidate, options) for candidate in candidates]


def _read(candidate: Candidate, options: PackOptions) -> Read:
    """Read and check a pair; return the reason if it cannot be used."""
    hashed, metadata = None, None
    assert isinstance(candidate.image, ByteRange)
    try:
        caption = _read_text(candidate.caption, "caption", options)
        if candidate.metadata is not None:
            metadata = _read_text(candidate.metadata, "metadata", options)
        # Captions from a table are on separate lines already
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
        if options.near >= 0:  # this decode also finds all errors that --check would find
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
    if isinstance(source, bytes):  # the reader of the table has decoded it already
        return source
    try:
        return decode(source.read(), options.encoding or None).encode()
    except NotText as error:
        raise BadCaption(f"the {what} is {error}") from error


def _in_metadata(candidate: Candidate) -> bool:
    """True if there is no .txt, but a file of metadata that may have captions."""
    return candidate.caption == b"" and isinstance(candidate.metadata, ByteRange)


_parsed = cache(CaptionTemplate.parse)
