"""What stands on both sides of a split, cheaply enough to look at before every run.

Exact copies only; ``inspection`` finds those that merely look alike.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from clipft.data.captions.table import CaptionTable
from clipft.data.shards.dataset import PairDataset

_MOST_READ = 200_000
"""Pictures that are looked into at most; beyond, copies are left to ``clipft inspect``."""


def shared_images(val: PairDataset, train: PairDataset) -> int:
    """Pictures of ``val`` that ``train`` has as well, byte for byte.

    The index knows the pictures' sizes: only those of equal size are read.
    """
    ours, theirs = image_sizes(val), image_sizes(train)
    ours_alike = np.flatnonzero(np.isin(ours, theirs))
    theirs_alike = np.flatnonzero(np.isin(theirs, ours))
    if len(ours_alike) + len(theirs_alike) > _MOST_READ:
        return 0
    known = set(image_hashes(train, theirs_alike))
    return sum(digest in known for digest in image_hashes(val, ours_alike))


def shared_captions(val: CaptionTable, train: CaptionTable) -> int:
    """Pairs of ``val`` one of whose captions is one of ``train``'s."""
    known = {caption for captions in train.by_pair() for caption in captions}
    return sum(any(caption in known for caption in captions) for captions in val.by_pair())


def image_sizes(pairs: PairDataset) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Bytes of each picture, by the index."""
    whole = np.concatenate([shard.places[:, 0, 1] for shard in pairs.shards])
    return whole[: len(pairs)]


def image_hashes(pairs: PairDataset, numbers: Iterable[int]) -> Iterator[bytes]:
    """SHA-256 of the pictures of some pairs."""
    for number in numbers:
        yield hashlib.sha256(pairs[int(number)].image).digest()


def same_images(pairs: PairDataset) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """int64 [N]: equal numbers for pictures that are equal byte for byte.

    The index knows the pictures' sizes: only those of equal size are read.
    """
    sizes = image_sizes(pairs)
    _, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    numbers = np.arange(len(pairs))
    doubtful: Sequence[int] = np.flatnonzero(counts[which] > 1).tolist()
    first: dict[bytes, int] = {}
    for number, digest in zip(doubtful, image_hashes(pairs, doubtful), strict=True):
        numbers[number] = first.setdefault(digest, number)
    return numbers
