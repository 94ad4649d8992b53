"""Opening WebDataset shards: any pair of any shard by its number.

A shard is a plain tar whose members share a key: ``chair.jpg``, ``chair.txt`` and, where
there is one, ``chair.json``. The headers are read once and give the place of each member,
so a global shuffle and a resumed run cost nothing; the pictures are read when asked for.
"""

import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clipft.errors import DataError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
CAPTION_SUFFIX = "txt"
METADATA_SUFFIX = "json"

_FIELDS = ("image", "caption", "metadata")
_PACK = "pack raw files with `clipft pack SRC OUT`"


@dataclass(frozen=True)
class Skipped:
    """A pair that cannot be used, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class RawPair:
    """The bytes of one pair as they lie in the shard."""

    key: str
    shard: str
    image: bytes
    caption: bytes


@dataclass(frozen=True)
class Shard:
    """One indexed tar. ``places`` is int64 [pairs, 3 members, (offset, bytes)]; -1: absent."""

    path: Path
    keys: list[str]
    places: "np.ndarray[Any, np.dtype[np.int64]]"
    skipped: list[Skipped]


def index_shard(path: Path) -> Shard:
    """Read the headers of one tar.

    Members that are not regular files, or whose key has no image or no caption, are left
    out and listed in ``skipped``; nothing is ever extracted, so names cannot escape.

    Raises:
        DataError: the file is not a whole, uncompressed tar.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: list[Skipped] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                reason = _file_member(member, found)
                if reason:
                    skipped.append(Skipped(path.name, member.name, reason))
            _check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole tar: {error}", f"fetch the shard again, or {_PACK}"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the file") from error
    keys = []
    for key, members in found.items():
        missing = [name for name in ("image", "caption") if name not in members]
        if missing:
            skipped.append(Skipped(path.name, key, f"no {' and no '.join(missing)}"))
        else:
            keys.append(key)
    places = [[found[key].get(name, (-1, -1)) for name in _FIELDS] for key in keys]
    return Shard(path, keys, np.array(places, np.int64).reshape(-1, len(_FIELDS), 2), skipped)


def _check_end(tar: tarfile.TarFile) -> None:
    """A cut or damaged header ends tarfile's reading like a proper end does: tell them apart."""
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")


def _file_member(
    member: tarfile.TarInfo, found: dict[str, dict[str, tuple[int, int]]]
) -> str | None:
    """Note where ``member`` lies; returns why it cannot be used, if so."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "not a regular file"
    name = PurePosixPath(member.name)
    kind = _kind(name.suffix)
    if kind is None or name.name.startswith("."):
        return None  # other tools' members
    members = found.setdefault(str(name.with_suffix("")), {})
    if kind in members:
        return f"a second {kind} of one key"
    members[kind] = (member.offset_data, member.size)
    return None


def _kind(suffix: str) -> str | None:
    bare = suffix.removeprefix(".").lower()
    if bare in IMAGE_SUFFIXES:
        return "image"
    return {CAPTION_SUFFIX: "caption", METADATA_SUFFIX: "metadata"}.get(bare)


@dataclass(frozen=True)
class PairDataset:
    """All pairs of some shards, numbered from 0 in the order of the shards' names."""

    shards: Sequence[Shard]
    limit: int = 0
    _starts: "np.ndarray[Any, np.dtype[np.int64]]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(shard.keys) for shard in self.shards]
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
        return RawPair(shard.keys[row], shard.path.name, image, caption)

    def metadata(self, number: int) -> dict[str, Any]:
        """The ``.json`` of a pair; empty where there is none or it is not an object."""
        shard, row = self._place(number)
        if shard.places[row, _FIELDS.index("metadata"), 0] < 0:
            return {}
        try:
            value = json.loads(self._read(shard, row, "metadata"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def skipped(self) -> list[Skipped]:
        return [skipped for shard in self.shards for skipped in shard.skipped]

    def identity(self) -> str:
        """Names and counts of the shards: equal for equal data, whatever the folder."""
        return ";".join(f"{s.path.name}:{len(s.keys)}" for s in self.shards) + f";{len(self)}"

    def _place(self, number: int) -> tuple[Shard, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[which], number - int(self._starts[which])

    @staticmethod
    def _read(shard: Shard, row: int, name: str) -> bytes:
        # Opened each time: 10 microseconds, and no descriptor is held or inherited.
        offset, size = (int(v) for v in shard.places[row, _FIELDS.index(name)])
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
    dataset = PairDataset([index_shard(path) for path in paths], limit)
    if not len(dataset):
        raise DataError(
            f"no pair of image and caption in the {len(paths)} shards of {folder}", _PACK
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
    return f"no .tar in {folder}: found {suffixes}", _PACK


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{count} {name}" for name, count in ranked) or "nothing"
