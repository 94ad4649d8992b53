"""The index of a shard: which pairs it holds and where their bytes lie.

Made once per shard from the tar's headers and kept beside it (in the cache folder where that
cannot be written). Reopened through a memory map: worker processes share one copy in the
system's page cache, whatever the number of pairs; a pair takes 56 bytes and those of its key.

File: 8 bytes magic, the length of the JSON header (little-endian uint64), the header, then
``places`` int64 [pairs, 3, 2], ``key_ends`` int64 [pairs], the keys' UTF-8 bytes.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clipft.core.common import cache_folder
from clipft.core.errors import DataError, StorageError
from clipft.core.files import replacing
from clipft.data.shards.tar import Member, read_members

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
CAPTION_SUFFIX = "txt"
METADATA_SUFFIX = "json"
FIELDS = ("image", "caption", "metadata")
PACK_HINT = "pack raw files with `clipft pack SRC OUT`"

_MAGIC = b"clipftx2"
_INT = np.dtype("<i8")


@dataclass(frozen=True)
class Skipped:
    """A pair that cannot be used, and why."""

    shard: str
    key: str
    reason: str


Stamp = tuple[int, int]
"""Bytes and time of the last change in ns: another state of a file has another stamp."""


def stamp_of(state: os.stat_result) -> Stamp:
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """One indexed tar. ``places`` is int64 [pairs, 3 members, (offset, bytes)]; -1: absent.

    ``key_bytes`` uint8 holds all keys one after the other, ``key_ends`` int64 [pairs] where
    each ends. ``stamp`` tells the state of the file that was indexed.
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
        """Equal for equal keys, sizes of members and their order, wherever the shard lies."""
        content = hashlib.blake2b(self.key_bytes.data, digest_size=8)
        for array in (self.key_ends, self.places[..., 1]):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A started (not forked) worker maps the index anew rather than being sent a copy
        return _reopened, (self.path, self.stamp)


def _reopened(path: Path, stamp: Stamp) -> Shard:
    """The shard as it was when indexed; without pairs where it is no longer that."""
    try:
        shard = open_shard(path)
    except DataError:
        shard = None
    return shard if shard and shard.stamp == stamp else _shard(path, stamp, {}, [])


def open_shard(path: Path) -> Shard:
    """A shard through its index; made now where there is none that fits size and mtime.

    Raises:
        DataError: the file is not a whole, uncompressed tar, or cannot be read.
    """
    try:
        stamp = stamp_of(path.stat())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", "check that it is there and may be read"
        ) from error
    for place in _index_places(path):
        try:
            return _load(place, path, stamp)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or of another state of the shard: it is made anew
    shard = index_shard(path)
    for place in _index_places(path):
        try:
            _save(shard, place)
            return _load(place, path, shard.stamp)
        except (StorageError, OSError, ValueError):
            continue
    return shard


def index_shard(path: Path) -> Shard:
    """Read the headers of one tar.

    Members that are not regular files, or whose key has no image or no words (caption or
    metadata), are left out and listed in ``skipped``; nothing is ever extracted, so names
    cannot escape.

    Raises:
        DataError: the file is not a whole, uncompressed tar.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: list[Skipped] = []
    try:
        stamp = stamp_of(path.stat())  # before the reading: a change meanwhile is noticed
        for member in read_members(path):
            reason = _file_member(member, found)
            if reason:
                skipped.append(Skipped(path.name, printable(member.name), reason))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole tar: {error}", f"fetch the shard again, or {PACK_HINT}"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", "check that it is there and may be read"
        ) from error
    pairs = {}
    for key, members in found.items():
        if "image" not in members:
            skipped.append(Skipped(path.name, printable(key), "no image"))
        elif not members.keys() & {"caption", "metadata"}:
            skipped.append(Skipped(path.name, printable(key), "no caption"))
        else:
            pairs[key.encode("utf-8", "surrogateescape")] = members
    return _shard(path, stamp, pairs, skipped)


def _shard(
    path: Path,
    stamp: Stamp,
    pairs: dict[bytes, dict[str, tuple[int, int]]],
    skipped: list[Skipped],
) -> Shard:
    places = [[members.get(name, (-1, -1)) for name in FIELDS] for members in pairs.values()]
    return Shard(
        path,
        stamp,
        np.array(places, _INT).reshape(-1, len(FIELDS), 2),
        np.cumsum([len(key) for key in pairs], dtype=_INT),
        np.frombuffer(b"".join(pairs), np.uint8),
        skipped,
    )


def _file_member(member: Member, found: dict[str, dict[str, tuple[int, int]]]) -> str | None:
    """Note where ``member`` lies; returns why it cannot be used, if so."""
    if member.kind == "folder":
        return None
    if member.kind != "file":
        return "not a regular file"
    found_as = member_of(member.name)
    if found_as is None:
        return None  # other tools' members
    key, kind = found_as
    members = found.setdefault(key, {})
    if kind in members:
        return f"a second {kind} of one key"
    members[kind] = (member.offset, member.size)
    return None


def member_of(name: str) -> tuple[str, str] | None:
    """(key, kind of ``FIELDS``) of a member's name; None: not of any pair."""
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.rpartition(".")
    kind = _kind(suffix) if dot and stem else None
    if kind is None or file.startswith("."):
        return None
    return _key(folder, stem), kind


def printable(name: str) -> str:
    """Bytes that are not UTF-8 as replacement characters, as ``Shard.key`` has them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _key(folder: str, stem: str) -> str:
    if not folder:
        return stem
    plain = f"{folder}/{stem}"
    return str(PurePosixPath(plain)) if "./" in plain or "//" in plain else plain


def _kind(suffix: str) -> str | None:
    bare = suffix.lower()
    if bare in IMAGE_SUFFIXES:
        return "image"
    return {CAPTION_SUFFIX: "caption", METADATA_SUFFIX: "metadata"}.get(bare)


def _index_places(path: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return path.with_name(f".{path.name}.clipft-index"), cache_folder() / "indexes" / name


def _save(shard: Shard, place: Path) -> None:
    head = {
        "stamp": shard.stamp,
        "pairs": len(shard),
        "key_bytes": len(shard.key_bytes),
        "skipped": [asdict(skipped) for skipped in shard.skipped],
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % _INT.itemsize)  # the arrays after it stay aligned
    with replacing(place, shared=True) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for array in (shard.places, shard.key_ends, shard.key_bytes):
            file.write(np.ascontiguousarray(array).data)


def _load(place: Path, path: Path, stamp: Stamp) -> Shard:
    """
    Raises:
        OSError, ValueError, KeyError, TypeError: no index, or not one of this shard's state.
    """
    with place.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("not an index")
        length = int.from_bytes(file.read(8), "little")
        if length > place.stat().st_size:
            raise ValueError("cut off")
        head = json.loads(file.read(length))
    if head["stamp"] != list(stamp):
        raise ValueError("of another state of the shard")
    pairs, key_bytes = int(head["pairs"]), int(head["key_bytes"])
    start = len(_MAGIC) + 8 + length
    ends_at = start + pairs * len(FIELDS) * 2 * _INT.itemsize
    keys_at = ends_at + pairs * _INT.itemsize
    raw = np.asarray(np.memmap(place, np.uint8, mode="r"))  # memmap's own indexing is slow
    if min(pairs, key_bytes) < 0 or len(raw) != keys_at + key_bytes:
        raise ValueError("cut off")
    places = raw[start:ends_at].view(_INT).reshape(pairs, len(FIELDS), 2)
    shard = Shard(
        path,
        stamp,
        places,
        raw[ends_at:keys_at].view(_INT),
        raw[keys_at:],
        [Skipped(**skipped) for skipped in head["skipped"]],
    )
    _check_bounds(shard)
    return shard


def _check_bounds(shard: Shard) -> None:
    """An index comes from whoever supplied the shards: it may only point into its shard."""
    offsets, sizes = shard.places[..., 0], shard.places[..., 1]
    size, ends = shard.stamp[0], shard.key_ends
    if len(shard) and (
        int(shard.places.min()) < -1
        or int(offsets[:, 0].min()) < 0
        or bool(((sizes < 0) & (offsets >= 0)).any())
        or int(offsets.max()) > size
        or int(sizes.max()) > size
        or int(ends[0]) < 0
        or int(ends[-1]) != len(shard.key_bytes)
        or bool((np.diff(ends) < 0).any())
    ):
        raise ValueError("points out of the shard")
