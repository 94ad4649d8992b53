"""Train and validation parts that share nothing: no photo bytes, no caption, no product.

A random split of a catalogue leaks: the same photo, or the same words, stand on both sides
and the validation figures flatter. Pairs that share any, directly or through others, form
a group, and a group goes to one side as a whole.
"""

import hashlib
from collections.abc import Hashable, Sequence


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
