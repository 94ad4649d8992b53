"""Which photos are near-identical: the same shot re-encoded, shrunk or slightly changed.

Candidates are photos whose 64-bit difference hashes (dHash: where a 9 x 8 grey thumbnail grows
brighter to the right) differ in at most ``near`` bits. Catalogue photos are much white with the
product in the middle, so many strangers agree in that: candidates count only if their 24 x 24
colour thumbnails agree too.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

_BLOCK = 1024
_FLAT = 2  # of 255: less is noise, and must not decide a bit
_THUMBNAIL = 24
_SAME_LOOK, _NOISE = 0.10, 1.0
"""Two thumbnails show the same if the root mean square of their difference is at most
``_SAME_LOOK`` of the larger one's contrast (its standard deviation), plus ``_NOISE`` of 255.
Of 1,596 re-encoded and shrunk product photos this misses 3; other products start at 0.08."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PerceptualHash:
    """What a photo looks like: its dHash (64 bits), and its thumbnail (RGB bytes)."""

    hash: int
    thumbnail: bytes


def perceptual_hash(image: Image.Image) -> PerceptualHash:
    """The look of an RGB picture of at least 24 pixels a side; smaller ones are blurry."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    bits = (grey[:, 1:] > grey[:, :-1] + _FLAT).flatten()
    thumbnail = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX).tobytes()
    return PerceptualHash(int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail)


def near_duplicates(looks: Sequence[PerceptualHash], near: int) -> list[tuple[int, int]]:
    """All (i, j), i < j, that are near-identical."""
    if not looks:
        return []
    close = close_hashes(np.array([look.hash for look in looks], np.uint64), near)
    thumbnails = np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8)
    thumbnails = thumbnails.reshape(len(looks), -1)
    contrast = np.array([row.std() for row in thumbnails])
    found = []
    for start in range(0, len(close), _BLOCK):
        one, other = close[start : start + _BLOCK].T
        difference = thumbnails[one].astype(np.float32) - thumbnails[other]
        distance = np.square(difference).mean(axis=1) ** 0.5
        allowed = _SAME_LOOK * np.maximum(contrast[one], contrast[other]) + _NOISE
        found += close[start : start + _BLOCK][distance <= allowed].tolist()
    return [(one, other) for one, other in found]


def close_hashes(hashes: Hashes, near: int) -> Rows:
    """All (i, j), i < j, in order, whose hashes differ in at most ``near`` bits; exact.

    Of near + 1 bands of the hash, at least one must be equal (pigeonhole), so only rows that
    share a band are compared. A pair is one number until the end: i * rows + j.
    """
    found = [np.empty(0, np.int64)]
    edges = [round(band * 64 / (near + 1)) for band in range(near + 2)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows) > 1:
                found += _near_among(hashes, rows, near)
    codes = np.unique(np.concatenate(found))
    return np.stack(np.divmod(codes, max(1, len(hashes))), axis=1)


def _near_among(hashes: Hashes, rows: Rows, near: int) -> Iterable[Rows]:
    for start in range(0, len(rows), _BLOCK):
        block, later = rows[start : start + _BLOCK], rows[start:]  # a stable order: rows rise
        one, other = np.nonzero(
            np.bitwise_count(hashes[block][:, None] ^ hashes[later][None]) <= near
        )
        rising = one < other
        yield block[one[rising]] * len(hashes) + later[other[rising]]


class Groups:
    """Union-find over rows."""

    def __init__(self, rows: int) -> None:
        self._parent = list(range(rows))

    def find(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, one: int, other: int) -> None:
        # The lower row leads, so the outcome does not depend on the order of joins
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low

    def join_equal(self, values: Sequence[Hashable]) -> None:
        """Rows with equal values belong together."""
        first: dict[Hashable, int] = {}
        for row, value in enumerate(values):
            self.join(first.setdefault(value, row), row)


def validation_rows(same: Sequence[Sequence[Hashable]], share: float, seed: int) -> set[int]:
    """Rows for validation: about ``share`` of all, in whole groups.

    Each of ``same`` names, per row, something that may not stand on both sides; the first is
    the photo. Groups are taken in the order of a hash of seed and leading row's photo, which
    a few new rows hardly disturb; one that would overshoot by more than it fills is passed
    over.
    """
    photos = same[0]
    groups = Groups(len(photos))
    for values in same:
        groups.join_equal(values)
    members: dict[int, list[int]] = {}
    for row in range(len(photos)):
        members.setdefault(groups.find(row), []).append(row)
    wanted, chosen = round(share * len(photos)), set[int]()
    for leader in sorted(members, key=lambda row: _draw(seed, photos[row])):
        if len(chosen) + len(members[leader]) / 2 <= wanted:
            chosen.update(members[leader])
    return chosen


def _draw(seed: int, photo: Hashable) -> str:
    return hashlib.sha256(f"{seed} {photo}".encode()).hexdigest()
