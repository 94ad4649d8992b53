"""Exact copies among the images and captions of one or two sets of pairs.

This is cheap enough to be done before every run; ``inspection`` also finds near-duplicates.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from clipft.data.captions.table import CaptionTable
from clipft.data.shards.dataset import PairDataset

MOST_READ = 200_000
"""If more images than this might be copies, they are left to ``clipft inspect``."""


def shared_images(val: PairDataset, train: PairDataset, most_read: int = MOST_READ) -> int | None:
    """Count the images of ``val`` that ``train`` has as well, byte for byte.

    The index knows the sizes in bytes, so only images whose size occurs on both sides are read.
    None if these are more than ``most_read``.
    """
    val_sizes, train_sizes = val.image_sizes, train.image_sizes
    in_val = np.flatnonzero(np.isin(val_sizes, train_sizes))
    in_train = np.flatnonzero(np.isin(train_sizes, val_sizes))
    if len(in_val) + len(in_train) > most_read:
        return None
    known = set(_image_hashes(train, in_train))
    return sum(digest in known for digest in _image_hashes(val, in_val))


def shared_captions(val: CaptionTable, train: CaptionTable) -> int:
    """Count the pairs of ``val`` of which a caption is also one in ``train``."""
    known = {caption for captions in train.by_pair() for caption in captions}
    return sum(any(caption in known for caption in captions) for captions in val.by_pair())


def same_images(pairs: PairDataset) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Number the images, int64 [pairs]: equal for images that are equal byte for byte."""
    _, which, counts = np.unique(pairs.image_sizes, return_inverse=True, return_counts=True)
    numbers = np.arange(len(pairs))
    # An image whose size no other has needs no reading
    doubtful: Sequence[int] = np.flatnonzero(counts[which] > 1).tolist()
    first: dict[bytes, int] = {}
    for number, digest in zip(doubtful, _image_hashes(pairs, doubtful), strict=True):
        numbers[number] = first.setdefault(digest, number)
    return numbers


def _image_hashes(pairs: PairDataset, numbers: Iterable[int]) -> Iterator[bytes]:
    for number in numbers:
        yield hashlib.sha256(pairs[int(number)].image).digest()
