"""The images to search among or to embed: pairs in shards, or loose files in a folder.

They are divided into parts: some pairs of one shard, or some files of one folder. A part is
embedded and stored as a whole, so if an image changes, only its part is embedded again.
"""

import hashlib
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

from clipft.core.errors import DataError, sentences
from clipft.core.files import did_you_mean_path
from clipft.data.images.formats import IMAGE_SUFFIXES, is_unnamed_image
from clipft.data.shards.contents import contents_of
from clipft.data.shards.dataset import PairDataset, RawPair
from clipft.data.shards.index import open_shard, stamp_of
from clipft.data.shards.metadata import parse_metadata
from clipft.data.shards.names import (
    CAPTION_SUFFIX,
    METADATA_SUFFIX,
    SPLITS,
    is_hidden,
    tars_in,
)
from clipft.data.shards.splits import split_named, split_of
from clipft.data.shards.tar import ByteRange

_PAIRS_PER_PART = 4096
"""This bounds how many pairs have to be embedded again after a kill."""
FILES_PER_PART = 256
"""Roughly how many files have to be embedded again after one of them changed."""
_MAX_TEXT_BYTES = 1 << 20
_LONGEST_NAME = 120


@dataclass(frozen=True)
class ImagePart:
    """Images that are embedded and stored together.

    Attributes:
        state: A text that changes if and only if one of the images changes.
        count: The number of images.
        read: Returns the image with a number below ``count`` as a pair, with an empty caption if it
            has none. It raises a DataError if the shard or file was changed or removed.
        read_texts: Does the same without reading the bytes of the image.
        name: A unique name that can be a file name.
        split: The split of the images, or "" if the folders do not name one.
    """

    state: str
    count: int
    read: Callable[[int], RawPair]
    read_texts: Callable[[int], RawPair]
    name: str = ""
    split: str = ""


@dataclass(frozen=True)
class JoinedParts:
    """Several parts with one numbering, as the loader reads them."""

    parts: Sequence[ImagePart]

    @cached_property
    def ends(self) -> list[int]:
        """The number after the last image of each part."""
        return list(accumulate(part.count for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.parts else 0

    def __getitem__(self, number: int, /) -> RawPair:
        which = bisect_right(self.ends, number)
        pair = self.parts[which].read(number - (self.ends[which - 1] if which else 0))
        return RawPair(number, pair.key, pair.shard, pair.image, pair.caption, pair.metadata)

    def texts(self, number: int, /) -> RawPair:
        """Read the caption and the metadata of an image, without the bytes of the image."""
        which = bisect_right(self.ends, number)
        pair = self.parts[which].read_texts(number - (self.ends[which - 1] if which else 0))
        return RawPair(number, pair.key, pair.shard, b"", pair.caption, pair.metadata)

    def metadata(self, number: int, /) -> dict[str, Any]:
        """Read the metadata of an image; empty if there is none."""
        return parse_metadata(self[number].metadata)


def open_images(source: Path, files_per_part: int = FILES_PER_PART) -> list[ImagePart]:
    """Find the images in a folder.

    If the folder, or train/, val/ or test/ in it, holds ``*.tar`` files, these are read as shards.
    Otherwise the folder and its subfolders are searched for image files, except hidden ones, and a
    part has about ``files_per_part`` of them.

    Raises:
        DataError: There is no such folder or no image in it, or a shard is damaged.
    """
    folders = {source: split_named(source.name), **{source / split: split for split in SPLITS}}
    shards = [(path, split) for folder, split in folders.items() for path in tars_in(folder)]
    if shards:
        parts = [part for path, split in shards for part in _parts_of_shard(path, split)]
    else:
        parts = list(_parts_of_folder(source, files_per_part))
    if not parts:
        found = f"no folder {source}"
        if source.is_file():
            found = f"{source} is a file, not a folder"
        elif source.is_dir():
            found = f"no image in {source}: found {contents_of(source)}"
        hint = sentences(did_you_mean_path(source), "name a folder of shards or of images")
        raise DataError(found, hint)
    return parts


def _parts_of_shard(path: Path, split: str) -> Iterator[ImagePart]:
    shard = open_shard(path)
    pairs = PairDataset([shard])
    for first in range(0, len(shard), _PAIRS_PER_PART):
        last = min(first + _PAIRS_PER_PART, len(shard))
        yield ImagePart(
            state=f"{path.resolve()} {shard.stamp} {first} {last}",
            count=last - first,
            read=partial(_read_pair, pairs, first),
            read_texts=partial(_read_texts_of_pair, pairs, first),
            name=_name(split, f"{path.stem}-{first // _PAIRS_PER_PART:04d}"),
            split=split,
        )


def _name(split: str, rest: str) -> str:
    """Return a name that sorts by split and can be a file name; ``rest`` differs in each part."""
    plain = re.sub(r"[^\w-]", "_", rest, flags=re.ASCII)[:_LONGEST_NAME]
    if plain != rest:  # another name may have become the same
        plain += f"-{zlib.crc32(rest.encode('utf-8', 'surrogateescape')):08x}"
    return f"{split or 'data'}-{plain}"


def _read_pair(pairs: PairDataset, first: int, number: int) -> RawPair:
    return pairs[first + number]


def _read_texts_of_pair(pairs: PairDataset, first: int, number: int) -> RawPair:
    number += first
    texts = pairs.caption_and_metadata(number)
    named = pairs.named(number)
    return RawPair(number, named.key, named.shard, b"", *texts)


def _parts_of_folder(root: Path, files_per_part: int) -> Iterator[ImagePart]:
    """Divide the images of each folder by a hash of their names, so that an added or changed file
    affects only one part."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        stamps = {}
        for name in names:
            path = Path(place) / name
            suffix = name.rpartition(".")[2].lower()
            wanted = suffix in IMAGE_SUFFIXES or is_unnamed_image(str(path))
            if wanted and not is_hidden(name) and path.is_file() and os.access(path, os.R_OK):
                stamps[name] = stamp_of(path.stat())
        # A power of two, so that a growing folder is rarely divided into new parts
        parts = 1 << max(0, (len(stamps) // files_per_part).bit_length())
        buckets: dict[int, list[str]] = {}
        for name in sorted(stamps):
            buckets.setdefault(zlib.crc32(os.fsencode(name)) % parts, []).append(name)
        within = PurePath(place).relative_to(root)
        for bucket, members in sorted(buckets.items()):
            paths = tuple(str(within / name) for name in members)
            listed = "\0".join(map(str, (*paths, *(stamps[name] for name in members))))
            digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
            split = split_of(within / "file")
            # No slash in the name of the root, so that it differs from that of any folder
            name = "files-" if within == PurePath() else f"{within.as_posix()}/"
            yield ImagePart(
                state=f"{root.resolve()} {digest}",
                count=len(paths),
                read=partial(_read_file, root, paths),
                read_texts=partial(_read_texts_of_file, root, paths),
                name=_name(split, f"{name}{bucket:04d}"),
                split=split,
            )


def _read_texts_of_file(root: Path, names: Sequence[str], number: int) -> RawPair:
    return RawPair(number, names[number], str(root), b"", *_texts_beside(root / names[number]))


def _read_file(root: Path, names: Sequence[str], number: int) -> RawPair:
    """Read an image file, and the caption and metadata beside it."""
    path = root / names[number]
    try:
        image = ByteRange(str(path)).read()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            "restore the file, or run the search again without it",
        ) from error
    return RawPair(number, names[number], str(root), image, *_texts_beside(path))


def _texts_beside(image: Path) -> tuple[bytes, bytes]:
    """Read the caption and the metadata of an image file; usually there are none."""
    texts = []
    for suffix in (CAPTION_SUFFIX, METADATA_SUFFIX):
        try:
            texts.append(ByteRange(str(image.with_suffix(f".{suffix}"))).read(_MAX_TEXT_BYTES))
        except OSError:
            texts.append(b"")
    return texts[0], texts[1]
