"""Pictures to search among: those of shards, or the loose files of a folder, cut into parts.

A part is what is embedded and cached together: some pairs of one shard, or some files of one
folder. Its ``state`` changes whenever any of its pictures does, and only then.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clipft.core.errors import DataError
from clipft.data.shards.dataset import PairDataset, RawPair, shard_paths
from clipft.data.shards.index import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    METADATA_SUFFIX,
    Shard,
    Stamp,
    open_shard,
    stamp_of,
)
from clipft.data.shards.tar import ByteRange

_PAIRS = 4096
"""Pairs of a shard in a part: what a kill while embedding costs at most."""
_FILES = 256
"""Files in a part, about: what one changed file costs to embed again."""
_MOST_TEXT = 1 << 20


class PicturePart(Protocol):
    """Pairs by number from 0; a caption is b"" where there is none."""

    @property
    def state(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> RawPair:
        """
        Raises:
            DataError: the shard or file was changed or removed.
        """


def open_pictures(source: Path) -> Sequence[PicturePart]:
    """Of ``*.tar`` in a folder, or in its train/ and val/; else of the pictures in it and in
    the folders below, hidden ones left out.

    Raises:
        DataError: there is no folder, or no picture in it; a shard is not whole.
    """
    folders = [folder for name in ("train", "val") if (folder := source / name).is_dir()]
    with_shards = [folder for folder in (source, *folders) if any(folder.glob("*.tar"))]
    if with_shards:
        paths = [path for folder in with_shards for path in shard_paths(folder)]
        parts: list[PicturePart] = [part for path in paths for part in _of_shard(path)]
    else:
        parts = list(_of_folders(source))
    if not parts:
        raise DataError(
            f"no picture in {source}" if source.is_dir() else f"no folder {source}",
            "name a folder of shards or of pictures",
        )
    return parts


@dataclass(frozen=True)
class _ShardPart:
    """Pairs ``first`` to ``last`` of a shard."""

    shard: Shard
    first: int
    last: int

    @property
    def state(self) -> str:
        return f"{self.shard.path.resolve()} {self.shard.stamp} {self.first} {self.last}"

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, number: int, /) -> RawPair:
        return PairDataset([self.shard])[self.first + number]


def _of_shard(path: Path) -> Iterator[_ShardPart]:
    shard = open_shard(path)
    for first in range(0, len(shard), _PAIRS):
        yield _ShardPart(shard, first, min(first + _PAIRS, len(shard)))


@dataclass(frozen=True)
class _FilePart:
    """Files of one folder, named from ``root``, with their stamps."""

    root: Path
    names: tuple[str, ...]
    stamps: tuple[Stamp, ...]

    @property
    def state(self) -> str:
        listed = "\0".join(map(str, (*self.names, *self.stamps)))
        digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.root.resolve()} {digest}"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int, /) -> RawPair:
        path = self.root / self.names[number]
        try:
            image = ByteRange(str(path)).read()
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror}", "put it back, or search again without it"
            ) from error
        words = (_text(path.with_suffix(f".{s}")) for s in (CAPTION_SUFFIX, METADATA_SUFFIX))
        return RawPair(number, self.names[number], str(self.root), image, *words)


def _text(path: Path) -> bytes:
    try:
        return ByteRange(str(path)).read(_MOST_TEXT)
    except OSError:  # none there
        return b""


def _of_folders(root: Path) -> Iterator[_FilePart]:
    """Each folder's pictures in parts by a hash of their names: a new or changed file touches
    one part alone."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = _pictures(Path(place), names)
        parts = 1 << max(0, (len(found) // _FILES).bit_length())
        buckets: dict[int, list[str]] = {}
        for name in sorted(found):
            buckets.setdefault(zlib.crc32(os.fsencode(name)) % parts, []).append(name)
        for _, members in sorted(buckets.items()):
            paths = [(Path(place) / name).relative_to(root) for name in members]
            stamps = tuple(found[name] for name in members)
            yield _FilePart(root, tuple(map(str, paths)), stamps)


def _pictures(folder: Path, names: Sequence[str]) -> dict[str, Stamp]:
    found = {}
    for name in names:
        suffix = name.rpartition(".")[2].lower()
        path = folder / name
        wanted = suffix in IMAGE_SUFFIXES and not name.startswith(".")
        if wanted and path.is_file() and os.access(path, os.R_OK):
            found[name] = stamp_of(path.stat())
    return found
