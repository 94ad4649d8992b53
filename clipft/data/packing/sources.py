"""Lists the pairs of a source: a folder of raw files, a folder of shards, or a table.

In a folder, ``chair.jpg`` with ``chair.txt`` (and optionally ``chair.json``) is a pair, and so it
is within a .tar. A folder with both raw files and shards is refused, because such shards are often
an older copy of the same files.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from clipft.core.errors import UsageError
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.packing.tables import list_table
from clipft.data.shards.index import (
    CAPTION_SUFFIX,
    FIELDS,
    IMAGE_SUFFIXES,
    METADATA_SUFFIX,
    open_shard,
)
from clipft.data.shards.tar import ByteRange


def list_pairs(source: Path, out: Path, options: PackOptions, images: Path) -> Listing:
    """List all pairs of a folder in the order of their paths, or of a table in its own order.

    ``out`` is passed over if it is inside the source. Images within a table are saved in the
    folder ``images``.

    Raises:
        DataError: The source is neither a folder nor a readable table, or a shard is incomplete.
        UsageError: The folder mixes raw files and shards, or the table lacks a column.
        OSError: The disk is full, or refuses to write.
    """
    if not source.is_dir():
        return list_table(source, options, images)
    listing = Listing()
    shards: list[Path] = []
    stems: dict[Path, dict[str, Path]] = {}  # the files of each pair by their kind
    for path in _regular_files(source, out, listing):
        suffix = path.suffix.removeprefix(".").lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind == "tar":
            shards.append(path)
        elif kind in {"image", CAPTION_SUFFIX, METADATA_SUFFIX}:
            files = stems.setdefault(path.with_suffix(""), {})
            if kind in files:
                listing.skip(path, f"a second {kind} with the same name")
            else:
                files[kind] = path
    if shards and any("image" in files for files in stems.values()):
        raise UsageError(
            f"{source} holds both shards ({shards[0].name}) and image files",
            "pack one or the other: move either to a folder of its own",
        )
    if shards:
        for path in shards:
            _list_shard(path, listing)
    else:
        for stem, files in stems.items():
            _list_files(stem.name, files, listing)
    return listing


def _regular_files(folder: Path, out: Path, listing: Listing) -> Iterator[Path]:
    """Yield the files below ``folder``, sorted, without hidden ones. A link is followed only to a
    file inside the folder: the same pair would count twice, or the walk might never end."""
    root, target = folder.resolve(), out.resolve()
    for place, folders, names in os.walk(
        folder,
        onerror=lambda error: listing.skip(error.filename, error.strerror or "cannot be listed"),
    ):
        # os.walk goes on with what this list holds, in its order
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(place) / name for name in folders]:
            if path.is_symlink():
                listing.skip(path, "a link to a folder")
            elif path.resolve() == target:
                folders.remove(path.name)
        for path in [Path(place) / name for name in sorted(names) if not name.startswith(".")]:
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                listing.skip(path, "a link out of the folder")
            elif not os.path.isfile(path):  # Path.is_file raises if access is denied
                listing.skip(path, "not a regular file")
            else:
                yield path


def _list_files(name: str, files: dict[str, Path], listing: Listing) -> None:
    """Add the pair of these raw files; skip an image or a caption without the other."""
    image, caption = files.get("image"), files.get(CAPTION_SUFFIX)
    metadata = files.get(METADATA_SUFFIX)
    if image and caption:
        where, rest = str(image), ByteRange(str(metadata)) if metadata else None
        listing.candidates.append(
            Candidate(name, where, ByteRange(where), ByteRange(str(caption)), rest)
        )
    elif image or caption:
        listing.skip(image or caption, "no caption" if image else "no image")


def _list_shard(path: Path, listing: Listing) -> None:
    """Add the pairs of a shard, which stay in the tar until they are read."""
    shard, text = open_shard(path), str(path)  # all byte ranges of a shard share one string
    for skipped in shard.skipped:
        listing.skip(f"{path}:{skipped.key}", skipped.reason)
    for row in range(len(shard)):
        key = shard.key(row)
        ranges = {
            name: ByteRange(text, offset, size)
            for name, (offset, size) in zip(FIELDS, shard.places[row].tolist(), strict=True)
            if offset >= 0
        }
        # A shard may hold images with metadata alone; a caption template makes their captions
        if "caption" not in ranges:
            listing.skip(f"{path}:{key}", "no caption")
            continue
        name, where = key.rpartition("/")[2], f"{path}:{key}"
        image, caption, metadata = ranges["image"], ranges["caption"], ranges.get("metadata")
        listing.candidates.append(Candidate(name, where, image, caption, metadata))
