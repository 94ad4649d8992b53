"""Opening WebDataset shards: any pair of any shard by its number.

A shard is a plain tar whose members share a key: ``chair.jpg``, ``chair.txt`` and, where
there is one, ``chair.json``. Its index gives the place of each member, so a global shuffle
and a resumed run cost nothing; the pictures are read when asked for.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.order import EpochPlan
from clipft.data.shards.index import FIELDS, PACK_HINT, Shard, Skipped, open_shard, stamp_of


@dataclass(frozen=True)
class RawPair:
    """The bytes of one pair as they lie in the shard; no caption or metadata: b""."""

    number: int
    key: str
    shard: str
    image: bytes
    caption: bytes
    metadata: bytes = b""


@dataclass(frozen=True)
class PairDataset:
    """All pairs of some shards, numbered from 0 in the order of the shards' names."""

    shards: Sequence[Shard]
    limit: int = 0
    _starts: "np.ndarray[Any, np.dtype[np.int64]]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(shard) for shard in self.shards]
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        total = int(self._starts[-1])
        return min(total, self.limit) if self.limit else total

    def __getitem__(self, number: int) -> RawPair:
        """The raw bytes of a pair.

        Raises:
            DataError: the shard was changed or removed since it was indexed.
        """
        shard, row = self._place(number)
        members = _read(shard, row, FIELDS)
        return RawPair(number, shard.key(row), shard.path.name, *members)

    def named(self, number: int) -> RawPair:
        """A pair's key and shard alone, without reading anything."""
        shard, row = self._place(number)
        return RawPair(number, shard.key(row), shard.path.name, b"", b"")

    def caption_and_metadata(self, number: int) -> tuple[bytes, bytes]:
        """The pair without its picture: ``.txt`` and ``.json``; b"" where there is none."""
        caption, metadata = _read(*self._place(number), ("caption", "metadata"))
        return caption, metadata

    def metadata(self, number: int) -> dict[str, Any]:
        """The ``.json`` of a pair; empty where there is none or it is not an object."""
        return parse_metadata(self.caption_and_metadata(number)[1])

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[int]]:
        """All pairs, shuffled anew each epoch."""
        return plan.order

    @property
    def skipped(self) -> Sequence[Skipped]:
        return [skipped for shard in self.shards for skipped in shard.skipped]

    def identity(self) -> str:
        """Of names, keys and sizes: equal for equal data, whatever the folder."""
        shards = (f"{s.path.name}:{len(s)}:{s.digest}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}"

    def state(self) -> str:
        """Paths, sizes and times of the shards: changes whenever any of them does."""
        shards = (f"{s.path.resolve()}:{s.stamp}:{len(s)}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}"

    def _place(self, number: int) -> tuple[Shard, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[which], number - int(self._starts[which])


def _read(shard: Shard, row: int, names: Sequence[str]) -> list[bytes]:
    """Members of one pair, surely of the file that was indexed; b"" for one it has not.

    Opened each time: 10 microseconds, and no descriptor is held or inherited. The stamp is
    looked at (1 microsecond) after the reading, so that it vouches for what was read.
    """
    try:
        places = [shard.places[row, FIELDS.index(name)].tolist() for name in names]
        file = os.open(shard.path, os.O_RDONLY)
        try:
            found = [os.pread(file, max(0, size), max(0, offset)) for offset, size in places]
            same = stamp_of(os.fstat(file)) == shard.stamp
        finally:
            os.close(file)
    except (OSError, IndexError) as error:
        raise _changed(shard.path) from error
    whole = all(len(part) == max(0, size) for part, (_, size) in zip(found, places, strict=True))
    if not (same and whole):
        raise _changed(shard.path)
    return found


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} was changed or removed while it was in use",
        "put the shard back as it was, then run `clipft resume`",
    )


@dataclass(frozen=True)
class ChosenPairs:
    """Some pairs of a data set; each keeps its number there."""

    pairs: PairDataset
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> RawPair:
        return self.pairs[self.numbers[place]]


def open_pairs(folder: Path, limit: int = 0) -> PairDataset:
    """Open every ``*.tar`` of a folder.

    Raises:
        DataError: no folder, no tar in it (the message says what is there), no whole pair.
    """
    paths = shard_paths(folder)
    dataset = PairDataset([open_shard(path) for path in paths], limit)
    if not len(dataset):
        raise DataError(
            f"no pair of image and caption in {counted(len(paths), 'shard')} of {folder}", PACK_HINT
        )
    return dataset


def shard_paths(folder: Path) -> list[Path]:
    """Every ``*.tar`` of a folder, by name.

    Raises:
        DataError: no folder, or no tar in it (the message says what is there).
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(*_nothing(folder))
    return paths


def _nothing(folder: Path) -> tuple[str, str]:
    if re.match(r"[a-z0-9]+:", str(folder)):
        return f"{folder} is not a folder", "URLs and commands are not read: fetch the shards first"
    if not folder.is_dir():
        return (
            f"no folder {folder}",
            "name the folder that holds train/ and val/ with --data-dir, or fetch it with "
            "`clipft sync`",
        )
    suffixes = _counted(path.suffix.lower() or "no suffix" for path in folder.iterdir())
    return f"no .tar in {folder}: found {suffixes}", PACK_HINT


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{count} {name}" for name, count in ranked) or "nothing"


def parse_metadata(data: bytes) -> dict[str, Any]:
    """The ``.json`` of a pair; empty where it is not an object."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
