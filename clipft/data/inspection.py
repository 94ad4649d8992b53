"""What is in a catalogue, and what is wrong with it, before anyone trains on it.

Every picture is decoded in full. Candidates for near-identical photos are those whose 64-bit
difference hashes (dHash: where a 9 x 8 grey thumbnail grows brighter to the right) differ in
at most ``near`` bits. Catalogue photos are much white with the product in the middle, so many
strangers agree in that: candidates count only if their 24 x 24 colour thumbnails agree too.
"""

import hashlib
import io
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from clipft.data.captions import BadCaption, clean_caption
from clipft.data.images import BadImage, decode_image
from clipft.data.shards import PairDataset
from clipft.data.split import Groups

_BLOCK = 1024
_EXAMPLES = 5
_FLAT = 2  # of 255: less is noise, and must not decide a bit
_THUMBNAIL = 24
_SAME_LOOK, _NOISE = 0.18, 1.0
"""Two thumbnails show the same if the root mean square of their difference is at most
``_SAME_LOOK`` of the larger one's contrast (its standard deviation), plus ``_NOISE`` of 255."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class PairFacts:
    """One pair. ``photo`` is the SHA-256 of the bytes, ``words`` the tidied caption without
    case, ``size`` (width, height) upright; ``broken`` is why it cannot be used, or ""."""

    key: str
    photo: str = ""
    words: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    hash: int = 0
    thumbnail: bytes = b""
    broken: str = ""


@dataclass(frozen=True)
class SplitFacts:
    """Figures of one split. ``ceiling`` is the best R@K that paired retrieval can give with
    these duplicates, ties by lower index: of k pairs with one caption (or photo), at most K
    can have their own partner among the first K."""

    pairs: int
    usable: int
    no_pairs: dict[str, int]
    broken: list[dict[str, str]]
    kinds: dict[str, int]
    shorter_side: dict[str, float]
    smaller_than_model: int
    caption_tokens: dict[str, float]
    captions_cut: int
    same_photo: int
    near_photo: int
    same_caption: int
    largest_group: int
    ceiling: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Leak:
    """Pairs of the one side that also stand on the other, by what they share."""

    same_photo: int
    near_photo: int
    same_caption: int
    examples: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_facts(pairs: PairDataset, report: Callable[[int, int], None]) -> list[PairFacts]:
    """Decode every pair, on all processors."""
    facts = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for done, fact in enumerate(threads.map(lambda n: _fact(pairs, n), range(len(pairs)))):
            facts.append(fact)
            report(done + 1, len(pairs))
    return facts


def _fact(pairs: PairDataset, number: int) -> PairFacts:
    raw = pairs[number]
    try:
        image = decode_image(raw.image)
        words = clean_caption(raw.caption).casefold()
        with Image.open(io.BytesIO(raw.image)) as header:
            kind = (header.format or "?").lower()
    except (BadImage, BadCaption) as error:
        return PairFacts(f"{raw.shard}:{raw.key}", broken=str(error))
    photo = hashlib.sha256(raw.image).hexdigest()
    key = f"{raw.shard}:{raw.key}"
    return PairFacts(key, photo, words, kind, image.size, *look(image))


def look(image: Image.Image) -> tuple[int, bytes]:
    """What a photo looks like: its dHash, and its thumbnail as RGB bytes."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    bits = (grey[:, 1:] > grey[:, :-1] + _FLAT).flatten()
    thumbnail = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX).tobytes()
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail


def near_photos(facts: Sequence[PairFacts], near: int) -> list[tuple[int, int]]:
    """All (i, j), i < j, that are near-identical."""
    hashes = np.array([fact.hash for fact in facts], np.uint64)
    close = np.array(near_pairs(hashes, near), np.int64).reshape(-1, 2)
    looks = np.frombuffer(b"".join(fact.thumbnail for fact in facts), np.uint8)
    looks = looks.reshape(len(facts), -1)
    contrast = np.array([row.std() for row in looks])
    found = []
    for start in range(0, len(close), _BLOCK):
        one, other = close[start : start + _BLOCK].T
        difference = np.square(looks[one].astype(np.float32) - looks[other]).mean(axis=1) ** 0.5
        allowed = _SAME_LOOK * np.maximum(contrast[one], contrast[other]) + _NOISE
        found += close[start : start + _BLOCK][difference <= allowed].tolist()
    return [(one, other) for one, other in found]


def near_pairs(hashes: Hashes, near: int) -> list[tuple[int, int]]:
    """All (i, j), i < j, whose hashes differ in at most ``near`` bits; exact.

    Of near + 1 bands of the hash, at least one must be equal (pigeonhole), so only rows that
    share a band are compared.
    """
    found: set[tuple[int, int]] = set()
    edges = [round(band * 64 / (near + 1)) for band in range(near + 2)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows) > 1:
                found.update(_near_among(hashes, rows, near))
    return sorted(found)


def _near_among(hashes: Hashes, rows: "np.ndarray[Any, Any]", near: int) -> set[tuple[int, int]]:
    found = set()
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        bits = np.bitwise_count(hashes[block][:, None] ^ hashes[rows][None])
        for a, b in zip(*np.nonzero(bits <= near), strict=True):
            if block[a] < rows[b]:
                found.add((int(block[a]), int(rows[b])))
    return found


def split_facts(
    pairs: PairDataset,
    facts: Sequence[PairFacts],
    tokens: Sequence[int],
    context: int,
    image_size: int,
    near: int,
) -> SplitFacts:
    """Figures of one split; ``tokens`` are the lengths of the usable captions, uncut."""
    usable = [fact for fact in facts if not fact.broken]
    photos, words = [f.photo for f in usable], [f.words for f in usable]
    close = near_photos(usable, near)
    groups = Groups(len(usable))
    groups.join_equal(photos)
    groups.join_equal(words)
    for one, other in close:
        groups.join(one, other)
    members = Counter(groups.find(row) for row in range(len(usable)))
    sides = [min(fact.size) for fact in usable]
    return SplitFacts(
        pairs=len(facts),
        usable=len(usable),
        no_pairs=dict(Counter(skipped.reason for skipped in pairs.skipped)),
        broken=[{"pair": f.key, "reason": f.broken} for f in facts if f.broken],
        kinds=dict(Counter(fact.kind for fact in usable)),
        shorter_side=_spread(sides),
        smaller_than_model=sum(side < image_size for side in sides),
        caption_tokens=_spread(tokens),
        captions_cut=sum(length > context for length in tokens),
        same_photo=_extra(photos),
        near_photo=len({row for pair in close for row in pair if not _same(usable, pair)}),
        same_caption=_extra(words),
        largest_group=max(members.values(), default=0),
        ceiling={"text_to_image": _ceiling(words), "image_to_text": _ceiling(photos)},
    )


def leak(one: Sequence[PairFacts], other: Sequence[PairFacts], near: int) -> Leak:
    """Pairs of ``one`` whose photo or caption also stands in ``other``."""
    ours, theirs = ([f for f in side if not f.broken] for side in (one, other))
    photos, words = {f.photo for f in theirs}, {f.words for f in theirs}
    close = near_photos([*ours, *theirs], near)
    across = {a for a, b in close if a < len(ours) <= b}
    same_photo = {row for row, f in enumerate(ours) if f.photo in photos}
    same_caption = {row for row, f in enumerate(ours) if f.words in words}
    rows = sorted(same_photo | across | same_caption)
    return Leak(
        len(same_photo),
        len(across - same_photo),
        len(same_caption),
        [ours[row].key for row in rows[:_EXAMPLES]],
    )


def _same(facts: Sequence[PairFacts], pair: tuple[int, int]) -> bool:
    return facts[pair[0]].photo == facts[pair[1]].photo


def _extra(values: Sequence[str]) -> int:
    """How many are there beyond the first of each value."""
    return len(values) - len(set(values))


def _ceiling(values: Sequence[str]) -> dict[str, float]:
    counts = Counter(values).values()
    total = max(1, len(values))
    return {f"r@{k}": sum(min(k, count) for count in counts) / total for k in (1, 5, 10)}


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
