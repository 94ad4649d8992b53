"""Finds near-duplicate images by perceptual hashes: the same photo re-encoded, made smaller or
changed slightly.

Candidates are images whose 64-bit difference hashes (dHash: where a 9 x 8 gray thumbnail becomes
brighter to the right) differ in at most ``near`` bits. Images of a catalogue are mostly white with
the product in the middle, so the hashes of many different products agree. A candidate is therefore
a near-duplicate only if the 24 x 24 color thumbnails agree too.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

_BLOCK, _COLUMNS = 1024, 4096
# Of 255: a smaller difference between neighboring pixels is noise and must not set a bit
_LEAST_STEP = 2
_THUMBNAIL = 24
# Two thumbnails agree if the root mean square of their difference is at most _SAME of the larger
# one's contrast (its standard deviation), plus _NOISE of 255. Of 1,596 re-encoded and shrunk
# product images this misses 3; different products start at 0.08.
_SAME, _NOISE = 0.10, 1.0
_COARSE, _ROUNDING = 3, 1e-3

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class PerceptualHash:
    """The dHash (64 bits) and the thumbnail (24 x 24 RGB bytes) of an image."""

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
    """Return all (i, j), i < j, whose images look the same up to ``near`` bits of the dHash.

    Memory grows with the number of images and of near-duplicates. The time grows with the number
    of image pairs that share a band of their hash (see ``close_hashes``), and in the worst case
    with the square of the number of images.
    """
    if not hashes:
        return []
    alike = _Thumbnails(b"".join(h.thumbnail for h in hashes), len(hashes))
    dhashes = np.array([h.hash for h in hashes], np.uint64)
    codes = [one * len(hashes) + other for one, other in map(alike.of, close_hashes(dhashes, near))]
    found = np.unique(np.concatenate([np.empty(0, np.int64), *codes]))
    return [divmod(code, len(hashes)) for code in found.tolist()]


class _Thumbnails:
    """Compares thumbnails, given as their concatenated bytes."""

    def __init__(self, data: bytes, count: int) -> None:
        self._pixels = np.frombuffer(data, np.uint8).reshape(count, -1)
        self._contrast = np.empty(count, np.float32)
        self._coarse = np.empty((count, _COARSE**2 * 3), np.float32)
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            pixels = self._pixels[block].astype(np.float32)
            self._contrast[block] = pixels.std(axis=1)
            cell = _THUMBNAIL // _COARSE
            cells = pixels.reshape(-1, _COARSE, cell, _COARSE, cell, 3).mean(axis=(2, 4))
            self._coarse[block] = cells.reshape(len(pixels), -1)
        self._mean = self._coarse.mean(axis=1)

    def of(self, close: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        """Return the pairs (one, other) whose thumbnails agree."""
        one, other = close
        allowed = _SAME * np.maximum(self._contrast[one], self._contrast[other]) + _NOISE
        # The root mean square of a difference is at least as large as that of its means over blocks
        # of pixels. Comparing the means first is fast and rules out most pairs
        for values in (self._mean[:, None], self._coarse, self._pixels):
            kept = np.concatenate(
                [
                    self._distance(values, one[n : n + _BLOCK], other[n : n + _BLOCK])
                    <= allowed[n : n + _BLOCK] + (0 if values is self._pixels else _ROUNDING)
                    for n in range(0, len(one), _BLOCK)
                ]
                or [np.empty(0, bool)]
            )
            one, other, allowed = one[kept], other[kept], allowed[kept]
        return one, other

    @staticmethod
    def _distance(
        values: "np.ndarray[Any, Any]", one: Rows, other: Rows
    ) -> "np.ndarray[Any, np.dtype[np.float32]]":
        difference = values[one].astype(np.float32) - values[other]
        distance: np.ndarray[Any, np.dtype[np.float32]] = np.square(difference).mean(axis=1) ** 0.5
        return distance


def close_hashes(hashes: Hashes, near: int) -> Iterator[tuple[Rows, Rows]]:
    """Yield all pairs (i, j), i < j, of hashes that differ in at most ``near`` bits, in blocks.

    The result is exact: if hashes are divided into near + 1 bands, two such hashes have at least
    one equal band (pigeonhole principle), so only rows that share a band are compared. A pair is
    yielded once for each band it shares.
    """
    # A photo on white has no edges in large areas, so neighboring bits are often equal. Bands of
    # every (near + 1)-th bit reduce the comparisons of real product photos to a third
    shuffled = np.zeros_like(hashes)
    places = [place for band in range(near + 1) for place in range(band, 64, near + 1)]
    for place, source in enumerate(places):
        shuffled |= (hashes >> np.uint64(source) & np.uint64(1)) << np.uint64(place)
    low = 0
    for band in range(near + 1):
        high = low + len(range(band, 64, near + 1))
        own = (shuffled >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        low = high
        order = np.argsort(own, kind="stable")
        cuts = np.flatnonzero(np.diff(own[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows) > 1:
                yield from _close_of_band(hashes, rows, near)


def _close_of_band(hashes: Hashes, rows: Rows, near: int) -> Iterator[tuple[Rows, Rows]]:
    """Compare the hashes of all ``rows``, which are in ascending order."""
    own = hashes[rows]
    for start in range(0, len(rows), _BLOCK):
        block = own[start : start + _BLOCK, None]
        for first in range(start, len(rows), _COLUMNS):
            bits = np.bitwise_count(block ^ own[None, first : first + _COLUMNS])
            one, other = np.nonzero(bits <= near)
            one, other = rows[one + start], rows[other + first]
            ascending = one < other
            yield one[ascending], other[ascending]


def group_leaders(
    rows: int,
    same: Iterable[Sequence[Hashable]] = (),
    links: Iterable[tuple[int, int]] = (),
) -> list[int]:
    """Group rows that belong together, directly or through others, and return each row's leader:
    the lowest row of its group (union-find).

    Two rows belong together if one of the sequences in ``same``, each with a value for every row,
    has equal values for them, or if ``links`` contains them.
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

    Each sequence in ``same`` has a value for every row that must not occur on both sides; the first
    sequence identifies the image. Groups are taken in the order of a hash of the seed and the
    leading row's image, so a few new rows hardly change the choice. A group that would take the
    result further from the share is passed over.

    With ``labels``, one for each row or "", about ``share`` of each label is chosen, and rounding
    errors are carried over to the next label. Each label keeps a group for training.
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
