"""Opening WebDataset shards: any pair of any shard by its number.

A shard is a plain tar whose members share a key: ``chair.jpg``, ``chair.txt`` and, where
there is one, ``chair.json``. Its index gives the place of each member, so a global shuffle
and a resumed run cost nothing; the pictures are read when asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipft.data.shard_index import (
    FIELDS,
    PACK_HINT,
    Shard,
    Skipped,
    metadata_fields,
    open_shard,
)
from clipft.errors import DataError


@dataclass(frozen=True)
class RawPair:
    """The bytes of one pair as they lie in the shard."""

    key: str
    shard: str
    image: bytes
    caption: bytes


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
            DataError: the shard shrank or vanished since it was indexed.
        """
        shard, row = self._place(number)
        image, caption = self._read(shard, row, "image"), self._read(shard, row, "caption")
        return RawPair(shard.key(row), shard.path.name, image, caption)

    def metadata(self, number: int) -> dict[str, Any]:
        """The ``.json`` of a pair; empty where there is none or it is not an object."""
        shard, row = self._place(number)
        if shard.places[row, FIELDS.index("metadata"), 0] < 0:
            return {}
        return metadata_fields(self._read(shard, row, "metadata"))

    @property
    def skipped(self) -> list[Skipped]:
        return [skipped for shard in self.shards for skipped in shard.skipped]

    def identity(self) -> str:
        """Names and counts of the shards: equal for equal data, whatever the folder."""
        return ";".join(f"{s.path.name}:{len(s)}" for s in self.shards) + f";{len(self)}"

    def _place(self, number: int) -> tuple[Shard, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[which], number - int(self._starts[which])

    @staticmethod
    def _read(shard: Shard, row: int, name: str) -> bytes:
        # Opened each time: 10 microseconds, and no descriptor is held or inherited.
        offset, size = (int(v) for v in shard.places[row, FIELDS.index(name)])
        try:
            with shard.path.open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise _changed(shard.path) from error
        if data is None or len(data) != size:
            raise _changed(shard.path)
        return data


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} was changed or removed while it was in use",
        "put the shard back as it was, then run `clipft resume`",
    )


def open_pairs(folder: Path, limit: int = 0) -> PairDataset:
    """Open every ``*.tar`` of a folder.

    Raises:
        DataError: no folder, no tar in it (the message says what is there), no whole pair.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(*_nothing(folder))
    dataset = PairDataset([open_shard(path) for path in paths], limit)
    if not len(dataset):
        raise DataError(
            f"no pair of image and caption in the {len(paths)} shards of {folder}", PACK_HINT
        )
    return dataset


def _nothing(folder: Path) -> tuple[str, str]:
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
    ranked = sorted(counts.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{count} {name}" for name, count in ranked) or "nothing"
