"""Perceptual hashes, and the near-duplicates that they find: the same shot re-encoded, made smaller
or changed slightly.

Candidates are images whose 64-bit difference hashes (dHash: where a 9 x 8 gray thumbnail becomes
brighter to the right) differ in at most ``near`` bits. Images of a catalogue are mostly white with
the product in the middle, so the hashes of many different products agree. Candidates therefore
count only if their 24 x 24 color thumbnails agree too.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from PIL import Image

_BLOCK = 1024
# Of 255: a smaller difference between neighboring pixels is noise and must not decide a bit
_LEAST_STEP = 2
_THUMBNAIL = 24
# Two thumbnails agree if the root mean square of their difference is at most _SAME of the larger
# one's contrast (its standard deviation), plus _NOISE of 255. Of 1,596 re-encoded and shrunk
# product images this misses 3; different products start at 0.08.
_SAME, _NOISE = 0.10, 1.0

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PerceptualHash:
    """What an image looks like: its dHash (64 bits) and its thumbnail (24 x 24 RGB bytes)."""

    hash: int
    thumbnail: bytes


def perceptual_hash(image: Image.Image) -> PerceptualHash:
    """Hash an RGB image. Below 24 pixels a side, the thumbnail is a blurry enlargement."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    gray = np.asarray(small, np.int16)
    bits = (gray[:, 1:] > gray[:, :-1] + _LEAST_STEP).flatten()
    thumbnail = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX).tobytes()
    return PerceptualHash(int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail)


def near_duplicates(hashes: Sequence[PerceptualHash], near: int) -> list[tuple[int, int]]:
    """Return all (i, j), i < j, whose images look the same up to ``near`` bits of the dHash."""
    if not hashes:
        return []
    close = close_hashes(np.array([h.hash for h in hashes], np.uint64), near)
    thumbnails = np.frombuffer(b"".join(h.thumbnail for h in hashes), np.uint8)
    thumbnails = thumbnails.reshape(len(hashes), -1)
    contrast = np.array([row.std() for row in thumbnails])
    found = []
    for start in range(0, len(close), _BLOCK):
        one, other = close[start : start + _BLOCK].T
        difference = thumbnails[one].astype(np.float32) - thumbnails[other]
        distance = np.square(difference).mean(axis=1) ** 0.5
        allowed = _SAME * np.maximum(contrast[one], contrast[other]) + _NOISE
        found += close[start : start + _BLOCK][distance <= allowed].tolist()
    return [(one, other) for one, other in found]


def close_hashes(hashes: Hashes, near: int) -> Rows:
    """Find all pairs of hashes that differ in at most ``near`` bits: int64 [found, 2], i < j.

    Exact: of near + 1 bands of two such hashes, at least one must be equal (pigeonhole principle),
    so only rows that share a band are compared.
    """
    found = [np.empty(0, np.int64)]
    edges = [round(band * 64 / (near + 1)) for band in range(near + 2)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for rows in np.split(order, cuts):
            for start in range(0, len(rows) if len(rows) > 1 else 0, _BLOCK):
                # The sort is stable, so rows with an equal band are in ascending order
                block, later = rows[start : start + _BLOCK], rows[start:]
                bits = np.bitwise_count(hashes[block][:, None] ^ hashes[later][None])
                one, other = np.nonzero(bits <= near)
                ascending = one < other
                # A pair is one number until the end, i * rows + j, to make it unique quickly
                found.append(block[one[ascending]] * len(hashes) + later[other[ascending]])
    codes = np.unique(np.concatenate(found))
    return np.stack(np.divmod(codes, max(1, len(hashes))), axis=1)


def group_leaders(
    rows: int,
    same: Iterable[Sequence[Hashable]] = (),
    links: Iterable[tuple[int, int]] = (),
) -> list[int]:
    """Group rows that belong together, directly or through others, and return each row's leader:
    the lowest row of its group (union-find).

    Two rows belong together if one of ``same``, which hold a value for every row, has equal values
    for them, or if they are one of ``links``.
    """
    parents = list(range(rows))

    def leader(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    equal: list[tuple[int, int]] = []
    for values in same:
        first: dict[Hashable, int] = {}
        equal += [(first.setdefault(value, row), row) for row, value in enumerate(values)]
    for one, other in chain(equal, links):
        # The lower row leads, so the outcome does not depend on the order of the links
        low, high = sorted((leader(one), leader(other)))
        parents[high] = low
    return [leader(row) for row in range(rows)]


def links_of(values: Iterable[Iterable[Hashable]]) -> Iterator[tuple[int, int]]:
    """Yield (first row, row) for every value that a row shares with an earlier row.

    Each row has any number of values.
    """
    first: dict[Hashable, int] = {}
    for row, own in enumerate(values):
        for value in own:
            leader = first.setdefault(value, row)
            if leader != row:
                yield leader, row


def validation_rows(
    same: Sequence[Sequence[Hashable]], share: float, seed: int, labels: Sequence[str] = ()
) -> set[int]:
    """Choose rows for validation: about ``share`` of all, in whole groups.

    Each of ``same`` holds, for every row, a value that must not occur on both sides; the first of
    them identifies the image. Groups are taken in the order of a hash of the seed and the leading
    row's image, which a few new rows hardly change. A group that would overshoot the share by more
    than it fills is passed over.

    With ``labels``, one for each row or "", the share is taken of one label after the other, and
    what rounding leaves of one is taken of the next. Each label keeps a group for training.
    """
    images = same[0]
    members: dict[int, list[int]] = {}
    for row, leader in enumerate(group_leaders(len(images), same)):
        members.setdefault(leader, []).append(row)
    ranks = {row: hashlib.sha256(f"{seed} {images[row]}".encode()).hexdigest() for row in members}
    by_label: dict[str, list[int]] = {}
    for leader in sorted(members, key=ranks.__getitem__):
        by_label.setdefault(labels[leader] if labels else "", []).append(leader)
    seen, chosen = 0, set[int]()
    for label, leaders in sorted(by_label.items()):
        seen += sum(len(members[leader]) for leader in leaders)
        for leader in leaders[:-1] if label else leaders:
            if len(chosen) + len(members[leader]) / 2 <= round(share * seen):
                chosen.update(members[leader])
    return chosen
