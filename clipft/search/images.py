"""The images to search among: pairs in shards, or loose files in a folder.

They are divided into parts: some pairs of one shard, or some files of one folder. A part is
embedded and cached as a whole, so a changed image costs only the embedding of its own part again.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipft.core.errors import DataError, sentences
from clipft.core.files import did_you_mean_path
from clipft.data.images.formats import IMAGE_SUFFIXES, is_unnamed_image
from clipft.data.shards.contents import contents_of
from clipft.data.shards.dataset import PairDataset, RawPair
from clipft.data.shards.index import Shard, open_shard, stamp_of
from clipft.data.shards.names import (
    CAPTION_SUFFIX,
    METADATA_SUFFIX,
    SPLITS,
    is_hidden,
    tars_in,
)
from clipft.data.shards.tar import ByteRange

_PAIRS_PER_PART = 4096
"""This bounds how many pairs have to be embedded again after a kill."""
_FILES_PER_PART = 256
"""Roughly how many files have to be embedded again after one of them changed."""
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class ImagePart:
    """Images that are embedded and cached together.

    Attributes:
        state: Changes whenever one of the images does, and only then.
        count: The number of images.
        read: Returns the image of a number below ``count`` as a pair, with an empty caption if it
            has none. It raises a DataError if the shard or file was changed or removed.
    """

    state: str
    count: int
    read: Callable[[int], RawPair]


def open_images(source: Path) -> list[ImagePart]:
    """Find the images in a folder.

    If the folder, or train/, val/ or test/ in it, holds ``*.tar`` files, these are read as shards.
    Otherwise the folder and those below it are searched for image files, except hidden ones.

    Raises:
        DataError: There is no such folder or no image in it, or a shard is damaged.
    """
    folders = [source, *(source / split for split in SPLITS)]
    shards = [path for folder in folders for path in tars_in(folder)]
    if shards:
        parts = [part for path in shards for part in _parts_of_shard(open_shard(path))]
    else:
        parts = list(_parts_of_folder(source))
    if not parts:
        found = f"no folder {source}"
        if source.is_dir():
            found = f"no image in {source}: found {contents_of(source)}"
        hint = sentences(did_you_mean_path(source), "name a folder of shards or of images")
        raise DataError(found, hint)
    return parts


def _parts_of_shard(shard: Shard) -> Iterator[ImagePart]:
    for first in range(0, len(shard), _PAIRS_PER_PART):
        last = min(first + _PAIRS_PER_PART, len(shard))
        state = f"{shard.path.resolve()} {shard.stamp} {first} {last}"
        yield ImagePart(state, last - first, partial(_read_pair, shard, first))


def _read_pair(shard: Shard, first: int, number: int) -> RawPair:
    return PairDataset([shard])[first + number]


def _parts_of_folder(root: Path) -> Iterator[ImagePart]:
    """Divide the images of each folder by a hash of their names, so that an added or changed file
    affects one part alone."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        stamps = {}
        for name in names:
            path = Path(place) / name
            suffix = name.rpartition(".")[2].lower()
            wanted = suffix in IMAGE_SUFFIXES or is_unnamed_image(str(path))
            if wanted and not is_hidden(name) and path.is_file() and os.access(path, os.R_OK):
                stamps[name] = stamp_of(path.stat())
        # A power of two: as the folder grows, its parts are divided again only rarely
        parts = 1 << max(0, (len(stamps) // _FILES_PER_PART).bit_length())
        buckets: dict[int, list[str]] = {}
        for name in sorted(stamps):
            buckets.setdefault(zlib.crc32(os.fsencode(name)) % parts, []).append(name)
        for _, members in sorted(buckets.items()):
            paths = tuple(str((Path(place) / name).relative_to(root)) for name in members)
            listed = "\0".join(map(str, (*paths, *(stamps[name] for name in members))))
            digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
            state = f"{root.resolve()} {digest}"
            yield ImagePart(state, len(paths), partial(_read_file, root, paths))


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
    texts = []
    for suffix in (CAPTION_SUFFIX, METADATA_SUFFIX):
        try:
            texts.append(ByteRange(str(path.with_suffix(f".{suffix}"))).read(_MAX_TEXT_BYTES))
        except OSError:  # usually there is none
            texts.append(b"")
    return RawPair(number, names[number], str(root), image, *texts)
