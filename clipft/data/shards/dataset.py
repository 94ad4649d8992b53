"""Random access to the pairs of shards by number.

A shard is a plain tar. The members of a pair share a key: ``chair.jpg``, ``chair.txt`` and perhaps
``chair.json``. The index of a shard says where each member starts, so shuffling all pairs and
resuming in the middle of an epoch take no extra time. Images are read on access.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipft.core.errors import DataError
from clipft.data.order import EpochPlan
from clipft.data.shards.index import Shard, stamp_of
from clipft.data.shards.metadata import parse_metadata
from clipft.data.shards.names import FIELDS
from clipft.data.skipped import Skipped


@dataclass(frozen=True)
class RawPair:
    """The bytes of one pair as stored in the shard; b"" for a missing caption or metadata."""

    number: int
    key: str
    shard: str
    image: bytes
    caption: bytes
    metadata: bytes = b""


@dataclass(frozen=True)
class PairDataset:
    """The pairs of some shards, numbered from 0 in the order of the shards.

    The data set has the first ``limit`` pairs (0: all), or only the ``chosen`` ones among them.
    """

    shards: Sequence[Shard]
    limit: int = 0
    chosen: tuple[int, ...] | None = None
    _starts: "np.ndarray[Any, np.dtype[np.int64]]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(shard) for shard in self.shards]
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        total = int(self._starts[-1])
        return min(total, self.limit) if self.limit else total

    def __getitem__(self, number: int) -> RawPair:
        """Read a pair.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        shard, row = self._locate(number)
        # Read first, because this raises if the shard has changed; then its keys may be missing
        members = _read(shard, row, FIELDS)
        return RawPair(number, shard.key(row), shard.path.name, *members)

    def first(self, most: int) -> "PairDataset":
        """Return the first ``most`` pairs, with the same numbers."""
        if self.chosen is not None:
            return PairDataset(self.shards, self.limit, self.chosen[:most])
        return PairDataset(self.shards, min(most, len(self)))

    def named(self, number: int) -> RawPair:
        """Return a pair with its key and shard, without reading its bytes."""
        shard, row = self._locate(number)
        return RawPair(number, shard.key(row), shard.path.name, b"", b"")

    def caption_and_metadata(self, number: int) -> tuple[bytes, bytes]:
        """Read the ``.txt`` and the ``.json`` of a pair but not its image; b"" if there is none.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        caption, metadata = _read(*self._locate(number), ("caption", "metadata"))
        return caption, metadata

    def image_end(self, number: int, most: int) -> bytes:
        """Read the last ``most`` bytes of an image, or all if it has fewer.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        return _read(*self._locate(number), ("image",), most)[0]

    def metadata(self, number: int) -> dict[str, Any]:
        """Read the ``.json`` of a pair; empty if there is none or it is not an object."""
        return parse_metadata(self.caption_and_metadata(number)[1])

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[int]]:
        """Return the function (epoch, first) -> numbers of the pairs: shuffled in each epoch."""
        return plan.order

    @property
    def skipped(self) -> Sequence[Skipped]:
        return [skipped for shard in self.shards for skipped in shard.skipped]

    def identity(self) -> str:
        """A text that depends on the names, keys and sizes of the shards but not on the folder."""
        shards = (f"{s.path.name}:{len(s)}:{s.digest}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}{self._choice}"

    def state(self) -> str:
        """A text that changes with the path, size or time of any of the shards."""
        shards = (f"{s.path.resolve()}:{s.stamp}:{len(s)}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}{self._choice}"

    @property
    def _choice(self) -> str:
        return "" if self.chosen is None else f";{','.join(map(str, self.chosen))}"

    @property
    def image_sizes(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The size of each pair's image in bytes, int64 [pairs]."""
        sizes = np.concatenate([shard.places[:, 0, 1] for shard in self.shards])
        return sizes[: len(self)] if self.chosen is None else sizes[list(self.chosen)]

    def _locate(self, number: int) -> tuple[Shard, int]:
        if self.chosen is not None:
            number = self.chosen[number]
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[which], number - int(self._starts[which])


def _read(shard: Shard, row: int, names: Sequence[str], last: int | None = None) -> list[bytes]:
    """Read members of one pair, b"" for an absent one, and check that the shard is unchanged. With
    ``last``, read only the last ``last`` bytes of each.

    The file is opened each time. This takes 10 microseconds, and no descriptor is kept open or
    inherited by a worker process.
    """
    try:
        places = [shard.places[row, FIELDS.index(name)].tolist() for name in names]
        if last is not None:
            places = [(at + max(0, size - last), min(size, last)) for at, size in places]
        file = os.open(shard.path, os.O_RDONLY)
        try:
            found = [os.pread(file, max(0, size), max(0, offset)) for offset, size in places]
            # The stamp is checked after reading (1 microsecond), so that it covers the bytes read
            stamp = stamp_of(os.fstat(file))
        finally:
            os.close(file)
        sizes = [max(0, size) for _, size in places]
        if stamp != shard.stamp or [len(part) for part in found] != sizes:
            raise OSError("another state of the shard than the indexed one")
    except (OSError, IndexError) as error:
        raise DataError(
            f"{shard.path} was changed or removed while it was in use",
            "restore the shard, then run `clipft resume`",
        ) from error
    return found


@dataclass(frozen=True)
class ChosenPairs:
    """Some pairs of a data set. They keep their numbers."""

    pairs: PairDataset
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> RawPair:
        return self.pairs[self.numbers[place]]
