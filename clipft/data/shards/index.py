"""The index of a shard: its pairs, and where their bytes are in the tar.

An index is made once per shard from the headers of the tar and stored beside it, or in the cache
folder if that fails. It is opened through a memory map, so all worker processes share one copy in
the page cache. A pair takes 56 bytes and those of its key.

The file has 8 bytes of magic, the length of a JSON header (little-endian uint64), the header, and
then ``places`` int64 [pairs, 3, 2], ``key_ends`` int64 [pairs] and the UTF-8 bytes of the keys.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipft.core.cache import cache_folder, mark_used
from clipft.core.errors import DataError, StorageError
from clipft.core.files import replacing
from clipft.data.shards.contents import PACK_HINT
from clipft.data.shards.names import FIELDS, pair_up, parse_name
from clipft.data.shards.tar import read_members
from clipft.data.skipped import Skipped

# Increase the number when the same tar gives different pairs than before
_MAGIC = b"clipftx3"
_INT = np.dtype("<i8")
_ABSENT = (-1, -1)

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns. A changed file has a different stamp."""


def stamp_of(state: os.stat_result) -> Stamp:
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """An indexed tar.

    ``places`` int64 [pairs, 3, 2] holds (offset, bytes) of each pair's image, caption and metadata,
    (-1, -1) if one is absent. ``key_bytes`` uint8 holds all keys in a row, and ``key_ends`` int64
    [pairs] the end of each key. ``stamp`` is the stamp of the tar when it was indexed.
    """

    path: Path
    stamp: Stamp
    places: "np.ndarray[Any, np.dtype[np.int64]]"
    key_ends: "np.ndarray[Any, np.dtype[np.int64]]"
    key_bytes: "np.ndarray[Any, np.dtype[np.uint8]]"
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.places)

    def key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")

    @cached_property
    def digest(self) -> str:
        """The hash of the keys and the members' sizes, in their order; the path does not count."""
        content = hashlib.blake2b(self.key_bytes.data, digest_size=8)
        for array in (self.key_ends, self.places[..., 1]):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned (not forked) worker maps the index itself instead of receiving a copy
        return _reopen, (self.path, self.stamp)


def _reopen(path: Path, stamp: Stamp) -> Shard:
    """Open a shard that has this stamp; if it has changed, return a shard without pairs.

    Reading from a shard without pairs raises the same ``DataError`` as any changed shard.
    """
    try:
        shard = open_shard(path)
    except DataError:
        shard = None
    if shard and shard.stamp == stamp:
        return shard
    nothing = np.empty(0, _INT)
    return Shard(path, stamp, nothing.reshape(0, 3, 2), nothing, np.empty(0, np.uint8), [])


def open_shard(path: Path) -> Shard:
    """Open a shard through its index. The index is made if it is missing or out of date.

    Raises:
        DataError: The file is not a complete, uncompressed tar, or cannot be read.
    """
    try:
        stamp = stamp_of(path.stat())
    except OSError as error:
        raise _unreadable(path, error) from error
    beside, cached = index_places(path)
    mark_used(cached)
    for place in (beside, cached):
        try:
            return load_index(place, path, stamp)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the index is missing, or belongs to another state of the shard
    shard = index_shard(path)
    for place in index_places(path):
        try:
            _save(shard, place)
            return load_index(place, path, shard.stamp)
        except (StorageError, OSError, ValueError):
            continue
    return shard  # neither place can be written to, so the index is kept in memory


def index_places(path: Path) -> tuple[Path, Path]:
    """Return the two possible paths of an index: beside the shard and in the cache folder."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return path.with_name(f".{path.name}.clipft-index"), cache_folder() / "indexes" / name


def index_shard(path: Path) -> Shard:
    """Read the headers of one tar and pair its members by key.

    A member that is not a regular file, a second file of the same kind, and a key without an image
    or without words (caption or metadata) are listed in ``Shard.skipped`` with the reason. Nothing
    is ever extracted, so no member can be written outside a folder.

    Raises:
        DataError: The file is not a complete, uncompressed tar, or cannot be read.
    """
    try:
        stamp = stamp_of(path.stat())  # before reading, so that a change during reading is noticed
        members = read_members(path)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a complete tar: {error}", f"fetch the shard again, or {PACK_HINT}"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    samples: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}
    skipped: list[Skipped] = []
    for member in members:
        if member.kind == "folder":
            continue
        if member.kind != "file":
            skipped.append(Skipped(path.name, printable(member.name), "not a regular file"))
            continue
        named = parse_name(member.name)
        if named is None:
            continue  # a file of another tool
        parts = samples.setdefault(named.sample, {}).setdefault(named.key, {})
        if named.kind in parts:
            reason = f"a second {named.kind} with the same key"
            skipped.append(Skipped(path.name, printable(member.name), reason))
        else:
            parts[named.kind] = (member.offset, member.size)
    keys, places = list[bytes](), []
    for sample, files in samples.items():
        for key, found, reason in pair_up(sample, files):
            if reason:
                skipped.append(Skipped(path.name, printable(key), reason))
            else:
                keys.append(key.encode("utf-8", "surrogateescape"))
                places.append([found.get(field, _ABSENT) for field in FIELDS])
    return Shard(
        path,
        stamp,
        np.array(places, _INT).reshape(-1, len(FIELDS), 2),
        np.cumsum([len(key) for key in keys], dtype=_INT),
        np.frombuffer(b"".join(keys), np.uint8),
        skipped,
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read {path}: {error.strerror}", "check that the file exists and may be read"
    )


def printable(name: str) -> str:
    """Replace bytes that are not UTF-8 by replacement characters, as ``Shard.key`` does."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _save(shard: Shard, place: Path) -> None:
    head = {
        "stamp": shard.stamp,
        "pairs": len(shard),
        "key_bytes": len(shard.key_bytes),
        "skipped": [asdict(skipped) for skipped in shard.skipped],
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % _INT.itemsize)  # keeps the arrays after it aligned
    with replacing(place, shared=True) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for array in (shard.places, shard.key_ends, shard.key_bytes):
            file.write(np.ascontiguousarray(array).data)


def load_index(place: Path, path: Path, stamp: Stamp) -> Shard:
    """Map the index file ``place`` of the shard ``path``.

    Raises:
        OSError, ValueError, KeyError, TypeError: The index does not exist, is damaged, or belongs
            to another state of the shard than ``stamp``.
    """
    with place.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("not an index")
        length = int.from_bytes(file.read(8), "little")
        if length > place.stat().st_size:
            raise ValueError("truncated")
        head = json.loads(file.read(length))
    if head["stamp"] != list(stamp):
        raise ValueError("the shard has changed")
    pairs, key_bytes = int(head["pairs"]), int(head["key_bytes"])
    start = len(_MAGIC) + 8 + length
    ends_at = start + pairs * len(FIELDS) * 2 * _INT.itemsize
    keys_at = ends_at + pairs * _INT.itemsize
    # Indexing a memmap is several times as slow as indexing a plain array over the same memory
    raw = np.asarray(np.memmap(place, np.uint8, mode="r"))
    if min(pairs, key_bytes) < 0 or len(raw) != keys_at + key_bytes:
        raise ValueError("truncated")
    places = raw[start:ends_at].view(_INT).reshape(pairs, len(FIELDS), 2)
    key_ends = raw[ends_at:keys_at].view(_INT)
    # An index comes from whoever supplied the shards, so it may only point into its own shard
    offsets, sizes = places[..., 0], places[..., 1]
    if pairs and (
        int(places.min()) < -1
        or int(offsets[:, 0].min()) < 0
        or bool(((sizes < 0) & (offsets >= 0)).any())
        or int(offsets.max()) > stamp[0]
        or int(sizes.max()) > stamp[0]
        or int(key_ends[0]) < 0
        or int(key_ends[-1]) != key_bytes
        or bool((np.diff(key_ends) < 0).any())
    ):
        raise ValueError("points out of the shard")
    skipped = [Skipped(**skipped) for skipped in head["skipped"]]
    return Shard(path, stamp, places, key_ends, raw[keys_at:], skipped)
