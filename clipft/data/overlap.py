"""Exact copies among the images and captions of one or two sets of pairs.

This is cheap enough to be done before every run; ``inspection`` also finds near-duplicates.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from clipft.data.captions.table import CaptionTable
from clipft.data.shards.dataset import PairDataset

MOST_READ = 200_000
"""If more images than this might be copies, they are left to ``clipft inspect``."""
_END = 64
"""Bytes in which two images of the same size nearly always differ, because they are compressed."""


def shared_images(val: PairDataset, train: PairDataset, most_read: int = MOST_READ) -> int | None:
    """Count the images of ``val`` that are also in ``train``, byte for byte.

    Sizes in bytes are in the index. Only images whose size occurs in both sets are compared by
    their last bytes, and only images with the same last bytes are read in full. Returns None if
    more than ``most_read`` images have a size in common.
    """
    val_sizes, train_sizes = val.image_sizes, train.image_sizes
    in_val = np.flatnonzero(np.isin(val_sizes, train_sizes))
    in_train = np.flatnonzero(np.isin(train_sizes, val_sizes))
    if len(in_val) + len(in_train) > most_read:
        return None
    val_ends, train_ends = _image_ends(val, in_val), _image_ends(train, in_train)
    common = set(val_ends.values()) & set(train_ends.values())
    known = set(_image_hashes(train, [n for n, end in train_ends.items() if end in common]))
    alike = [number for number, end in val_ends.items() if end in common]
    return sum(digest in known for digest in _image_hashes(val, alike))


def shared_captions(val: CaptionTable, train: CaptionTable) -> int:
    """Count the pairs of ``val`` that have a caption which is also in ``train``."""
    known = {caption for captions in train.by_pair() for caption in captions}
    return sum(any(caption in known for caption in captions) for captions in val.by_pair())


def same_images(pairs: PairDataset) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return int64 [pairs], with equal numbers for images that are equal byte for byte."""
    _, which, counts = np.unique(pairs.image_sizes, return_inverse=True, return_counts=True)
    numbers = np.arange(len(pairs))
    # Images with a unique size need not be read
    ends = _image_ends(pairs, np.flatnonzero(counts[which] > 1))
    repeated = Counter(ends.values())
    doubtful = [number for number, end in ends.items() if repeated[end] > 1]
    first: dict[bytes, int] = {}
    for number, digest in zip(doubtful, _image_hashes(pairs, doubtful), strict=True):
        numbers[number] = first.setdefault(digest, number)
    return numbers


def _image_ends(pairs: PairDataset, numbers: Iterable[int]) -> dict[int, tuple[int, bytes]]:
    """Return the size and the last bytes of some images, by their number."""
    sizes = pairs.image_sizes
    return {int(n): (int(sizes[n]), pairs.image_end(int(n), _END)) for n in numbers}


def _image_hashes(pairs: PairDataset, numbers: Iterable[int]) -> Iterator[bytes]:
    for number in numbers:
        yield hashlib.sha256(pairs[int(number)].image).digest()
