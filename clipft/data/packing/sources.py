"""What there is to pack: raw files, shards, or a table that names the pictures.

Folder: ``chair.jpg`` with ``chair.txt`` (and ``chair.json`` where there is one) is a pair, and
so it is inside of a .tar. Raw files and shards in one folder are refused: such shards are
often an older copy of the same files.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clipft.core.errors import UsageError
from clipft.data.packing.download import Pictures
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.packing.tables import list_table
from clipft.data.shards.index import (
    CAPTION_SUFFIX,
    FIELDS,
    IMAGE_SUFFIXES,
    METADATA_SUFFIX,
    Shard,
    open_shard,
)
from clipft.data.shards.tar import ByteRange


@dataclass
class _Files:
    """What a folder holds: shards, and the files of each pair by their kind."""

    shards: list[Path] = field(default_factory=list)
    stems: dict[Path, dict[str, Path]] = field(default_factory=dict)


def list_pairs(source: Path, out: Path, options: PackOptions, pictures: Pictures) -> Listing:
    """All pairs of a folder in the order of their paths, or of a table in its own.

    ``out`` is left out where it stands inside of the source.

    Raises:
        DataError: neither a folder nor a table that can be read; a shard that is not whole.
        UsageError: raw files and shards are mixed; the table has no such column.
    """
    if not source.is_dir():
        return list_table(source, options, pictures)
    listing = Listing()
    files = _files(source, out, listing)
    if files.shards and any("image" in members for members in files.stems.values()):
        raise UsageError(
            f"{source} holds both shards ({files.shards[0].name}) and loose pictures",
            "pack the one or the other: move either to a folder of its own",
        )
    if files.shards:
        for path in files.shards:
            _list_shard(open_shard(path), listing)
    else:
        _list_files(files, listing)
    return listing


def _files(folder: Path, out: Path, listing: Listing) -> _Files:
    files = _Files()
    for path in _regular_files(folder, out, listing):
        suffix = path.suffix.removeprefix(".").lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind == "tar":
            files.shards.append(path)
        elif kind in {"image", CAPTION_SUFFIX, METADATA_SUFFIX}:
            members = files.stems.setdefault(path.with_suffix(""), {})
            if kind in members:
                listing.skip(path, f"a second {kind} of one name")
            else:
                members[kind] = path
    return files


def _regular_files(folder: Path, out: Path, listing: Listing) -> Iterator[Path]:
    """Sorted, without hidden ones; links are followed only to files inside the folder."""
    root, target = folder.resolve(), out.resolve()

    def unreadable(error: OSError) -> None:
        listing.skip(error.filename, error.strerror or "cannot be listed")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(place) / name for name in folders]:
            if path.is_symlink():
                listing.skip(path, "a link to a folder")
            elif path.resolve() == target:
                folders.remove(path.name)
        for path in [Path(place) / name for name in sorted(names) if not name.startswith(".")]:
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                listing.skip(path, "a link out of the folder")
            elif not _is_regular(path):
                listing.skip(path, "not a regular file")
            else:
                yield path


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _list_files(files: _Files, listing: Listing) -> None:
    for stem, members in files.stems.items():
        image, caption = members.get("image"), members.get(CAPTION_SUFFIX)
        metadata = members.get(METADATA_SUFFIX)
        if image and caption:
            place, rest = str(image), ByteRange(str(metadata)) if metadata else None
            listing.candidates.append(
                Candidate(stem.name, place, ByteRange(place), ByteRange(str(caption)), rest)
            )
        elif image or caption:
            listing.skip(image or caption, "no caption" if image else "no image")


def _list_shard(shard: Shard, listing: Listing) -> None:
    for skipped in shard.skipped:
        listing.skip(f"{shard.path}:{skipped.key}", skipped.reason)
    path = str(shard.path)
    for row in range(len(shard)):
        key = shard.key(row)
        blobs = {
            name: ByteRange(path, offset, size)
            for name, (offset, size) in zip(FIELDS, shard.places[row].tolist(), strict=True)
            if offset >= 0
        }
        if "caption" not in blobs:
            listing.skip(f"{shard.path}:{key}", "no caption")
            continue
        listing.candidates.append(
            Candidate(
                key.rpartition("/")[2],
                f"{shard.path}:{key}",
                blobs["image"],
                blobs["caption"],
                blobs.get("metadata"),
            )
        )
