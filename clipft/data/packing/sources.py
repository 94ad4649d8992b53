"""Lists the pairs of a source: a folder of raw files, a folder of shards, or a table.

In a folder or a .tar, ``chair.jpg`` with ``chair.txt`` (and optionally ``chair.json``) is a pair.
If fewer than half of a folder's images are in such pairs, tables that ``layouts.py`` recognizes are
used instead. A folder with both raw files and shards is refused, because such shards are often an
older copy of the same files.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clipft.core.errors import UsageError
from clipft.data.images.formats import is_unnamed_image
from clipft.data.packing.layouts import Photos, is_layout, list_layout
from clipft.data.packing.options import PackOptions
from clipft.data.packing.records import Candidate, Listing
from clipft.data.packing.rows.arrow import is_saved_part
from clipft.data.packing.tables import list_single_table
from clipft.data.shards.index import open_shard
from clipft.data.shards.names import FIELDS, FileName, is_hidden, pair_up, parse_name
from clipft.data.shards.splits import SPLIT_COLUMN, split_of_file
from clipft.data.shards.tar import ByteRange

FOREIGN_LINK = "a link out of the folder"
_OUTSIDE = "in none of the splits train, val and test"


@dataclass
class _Files:
    """The files of a folder by type. ``samples`` holds raw files by sample, name up to the last
    dot, and kind, in the format of ``pair_up``."""

    shards: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    samples: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)

    def images(self) -> list[str]:
        every = (parts for files in self.samples.values() for parts in files.values())
        return [parts["image"] for parts in every if "image" in parts]


def list_pairs(source: Path, out: Path, options: PackOptions, images: Path) -> Listing:
    """List all pairs of a folder in the order of their paths, or of a table in its own order.

    ``out`` is skipped if it is inside the source. Images inside a table are saved in the folder
    ``images``.

    Raises:
        DataError: The source is neither a folder nor a readable table, or a shard is incomplete.
        UsageError: The folder mixes raw files and shards, or the table lacks a column.
        OSError: The disk is full, or refuses to write.
    """
    if not source.is_dir():
        listing = list_single_table(source, options, images)
        if any(candidate.split for candidate in listing.candidates):
            listing.notes.append(f"The column {SPLIT_COLUMN} of {source} decides the split.")
        _drop_outside(listing)
        return listing
    listing = Listing()
    files = _sort_files(source, out, options, listing)
    photos = Photos(source, files.images())
    if files.shards and photos.paths:
        raise UsageError(
            f"{source} holds both shards ({files.shards[0].name}) and image files",
            "pack one or the other: move either to a folder of its own",
        )
    tables = files.tables or ([] if photos.paths else files.parquet)
    unused = {*files.tables, *files.parquet}
    if files.shards:
        for path in files.shards:
            _list_shard(path, split_of_file(path.relative_to(source)), options, listing)
    else:
        found = _list_raw(files, photos, options)
        # A few .txt files beside images do not mean that the data set consists of such pairs
        if tables and 2 * len(found.candidates) < max(1, len(photos.paths)):
            found = _list_tables(tables, options, images, photos)
            unused -= set(tables)
        listing.candidates = found.candidates
        listing.skipped += found.skipped
        listing.notes += found.notes
        for path in sorted(unused):
            listing.others.add(str(path.relative_to(source)))
    _drop_outside(listing)
    return listing


def _sort_files(source: Path, out: Path, options: PackOptions, listing: Listing) -> _Files:
    """Walk through the folder and sort its files by type."""
    files = _Files()
    for path in _regular_files(source, out, options.follow_links, listing):
        suffix = path.suffix.lower()
        if suffix == ".tar":
            files.shards.append(path)
        elif is_layout(path.name):
            files.tables.append(path)
        elif suffix == ".parquet" or (suffix == ".arrow" and is_saved_part(path)):
            files.parquet.append(path)
        elif name := parse_name(str(path)) or _unnamed_image(str(path)):
            parts = files.samples.setdefault(name.sample, {}).setdefault(name.key, {})
            if name.kind in parts:
                listing.skip(path, f"a second {name.kind} with the same name")
            else:
                parts[name.kind] = str(path)
        else:
            listing.others.add(str(path.relative_to(source)))
    return files


def _unnamed_image(path: str) -> FileName | None:
    """Parse the name of an image that has no file extension; None for other files.

    Caches of downloads often name images by a hash alone.
    """
    return FileName(path, path, "image") if is_unnamed_image(path) else None


def _regular_files(folder: Path, out: Path, follow: bool, listing: Listing) -> Iterator[Path]:
    """Yield the files below ``folder``, sorted, without hidden ones.

    Links to files inside the folder are followed. Other links could reach the same pair twice or
    never end, so they are followed only with ``follow``, and then no folder is entered twice.
    """
    root, target, entered = folder.resolve(), out.resolve(), set[str]()
    for place, folders, names in os.walk(
        folder,
        onerror=lambda error: listing.skip(error.filename, error.strerror or "cannot be listed"),
        followlinks=follow,
    ):
        if follow and (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        elif follow:
            entered.add(real)
        # os.walk continues with the folders in this list, in this order
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for path in [Path(place) / name for name in folders]:
            if path.is_symlink() and not follow:
                listing.skip(path, f"{FOREIGN_LINK} (to a folder)")
            elif path.resolve() == target:
                folders.remove(path.name)
        for path in [Path(place) / name for name in sorted(names) if not is_hidden(name)]:
            linked = path.is_symlink()
            if linked and not follow and not path.resolve().is_relative_to(root):
                listing.skip(path, FOREIGN_LINK)
            elif not os.path.isfile(path):  # Path.is_file raises if access is denied
                listing.skip(path, "a link to nothing" if linked else "not a regular file")
            else:
                yield path


def _list_raw(files: _Files, photos: Photos, options: PackOptions) -> Listing:
    """List the pairs of raw files, and skip an image or a caption without the other."""
    listing = Listing()
    for sample, parts_by_key in files.samples.items():
        for key, parts, reason in pair_up(sample, parts_by_key):
            captioned = "caption" in parts or "metadata" in parts
            if reason or "image" not in parts or not captioned:
                where = parts.get("image") or parts.get("caption")
                if where or "key" in reason:  # a .json alone belongs to another tool
                    listing.skip(where or key, reason or "no caption")
                continue
            where, rest = parts["image"], parts.get("metadata")
            listing.candidates.append(
                Candidate(
                    name=key.rpartition("/")[2],
                    where=where,
                    image=ByteRange(where),
                    caption=ByteRange(parts["caption"]) if "caption" in parts else b"",
                    metadata=ByteRange(rest) if rest else None,
                    split=photos.split_of(where),
                )
            )
    return listing


def _list_tables(tables: list[Path], options: PackOptions, images: Path, photos: Photos) -> Listing:
    """List the pairs of the tables, and skip the images that no table names."""
    listing = Listing()
    for table in tables:
        found = list_layout(table, options, images, photos)
        listing.candidates += found.candidates
        listing.skipped += found.skipped
        listing.notes += found.notes
    named = {c.image.path for c in listing.candidates if isinstance(c.image, ByteRange)}
    for path in photos.paths:
        if path not in named:
            listing.skip(path, "no caption")
    return listing


def _list_shard(path: Path, split: str, options: PackOptions, listing: Listing) -> None:
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
        if not ranges.keys() & {"caption", "metadata"}:
            listing.skip(f"{path}:{key}", "no caption")
            continue
        name, where = key.rpartition("/")[2], f"{path}:{key}"
        image, metadata = ranges["image"], ranges.get("metadata")
        caption = ranges.get("caption", b"")
        listing.candidates.append(Candidate(name, where, image, caption, metadata, split))


def _drop_outside(listing: Listing) -> None:
    """Skip the pairs that are in no split if other pairs are in a training split, because they may
    not be meant for training."""
    splits = {candidate.split for candidate in listing.candidates}
    if not {"", "train"} <= splits:
        return
    for candidate in listing.candidates:
        if not candidate.split:
            listing.skip(candidate.where, _OUTSIDE)
    listing.candidates = [candidate for candidate in listing.candidates if candidate.split]
