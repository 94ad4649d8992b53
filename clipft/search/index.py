"""Embeddings of images, made once and then searched by a text or by another image.

Each part of the data has its own file in the cache folder, named by a hash of the model, the
preprocessing and the state of the part. Only changed parts are embedded again, and an interrupted
search continues where it stopped. The files hold float32 and are memory-mapped. With float16 they
would be half as large, but queries were slower, because float16 has to be converted first.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from clipft.config.sections.model import AdaptSettings
from clipft.core.cache import cache_folder, mark_used
from clipft.core.files import replacing
from clipft.data.loader import LoaderOptions
from clipft.data.shards.dataset import RawPair
from clipft.runs.load import OpenedModel
from clipft.search.images import ImagePart, JoinedParts
from clipft.search.vectors import (
    Vectors,
    embed_images,
    embedding_width,
    preprocessing_of,
    weights_digest,
)

_FORMAT = "2"


@dataclass(frozen=True)
class Hit:
    """An image that was found. ``number`` counts over all parts."""

    number: int
    score: float
    pair: RawPair


@dataclass(frozen=True)
class ImageIndex:
    """The embeddings of all images.

    ``vectors`` has an array [images, D] per part, with rows of unit length; an image that cannot
    be decoded has a row of NaN. ``embedded`` counts the images that were not in the cache.
    """

    images: JoinedParts
    vectors: Sequence[Vectors]
    embedded: int

    def scores(self, query: Tensor) -> Vectors:
        """Return the cosine [images] of each image with a unit vector [D]; NaN if undecodable."""
        vector = query.numpy()
        # Unlike a matrix product, this gives equal rows equal scores in parts of any size
        return np.concatenate([np.vecdot(np.asarray(rows), vector) for rows in self.vectors])

    def best(self, scores: Vectors, count: int) -> list[Hit]:
        """Read the ``count`` images with the highest scores, in the order of ``ranked``.

        Raises:
            DataError: An image was changed or removed in the meantime.
        """
        found = self.ranked(scores, count)
        return [Hit(number, float(scores[number]), self.images[number]) for number in found]

    @staticmethod
    def ranked(scores: Vectors, count: int) -> list[int]:
        """Return the numbers of the ``count`` images with the highest scores; equal scores rank by
        number, and images without a score are left out."""
        usable = np.flatnonzero(~np.isnan(scores))
        if count < len(usable):
            # Sort only the best scores: partitioning millions takes milliseconds
            least = np.partition(scores[usable], -count)[-count]
            usable = usable[scores[usable] >= least]
        best = usable[np.argsort(-scores[usable], kind="stable")][:count]
        return [int(number) for number in best]


def open_index(
    opened: OpenedModel,
    parts: Sequence[ImagePart],
    options: LoaderOptions,
    report: Callable[[int, int], None],
) -> ImageIndex:
    """Load the embeddings of all parts, and make those that are missing.

    ``report`` is called with (done, total) while images are embedded.

    Raises:
        DataError: An image was changed or removed in the meantime.
        StorageError: The cache folder cannot be written to.
        NotFiniteError: The embedding of an image is not a number.
    """
    folder, files = cache_folder() / "pictures" / _model_key(opened), list[Path]()
    for part in parts:
        state = part.state.encode("utf-8", "surrogateescape")
        files.append(folder / f"{hashlib.sha256(state).hexdigest()[:32]}.npy")
    found = [_load(file, part.count) for file, part in zip(files, parts, strict=True)]
    missing = [at for at, vectors in enumerate(found) if vectors is None]
    to_embed = JoinedParts([parts[at] for at in missing])
    embedded = _embed_parts(opened, to_embed, options, report)
    for at, vectors in zip(missing, embedded, strict=True):
        with replacing(files[at], shared=True) as temporary, temporary.open("wb") as file:
            np.save(file, vectors)
        found[at] = _load(files[at], parts[at].count)  # memory-mapped, to free the memory
    complete = [vectors for vectors in found if vectors is not None]
    assert len(complete) == len(parts), "a part that was just saved cannot be read"
    mark_used(folder)
    return ImageIndex(JoinedParts(parts), complete, len(to_embed))


def _load(file: Path, rows: int) -> Vectors | None:
    """Map a file of embeddings; None if it is missing or damaged."""
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = vectors.ndim == 2 and len(vectors) == rows and vectors.dtype == np.float32
    return vectors if usable else None


def _model_key(opened: OpenedModel) -> str:
    """Hash everything but the image that its embedding depends on."""
    precision = opened.loaded.precision
    # The weights identify the model, not its name, so that copies of a model share the cache
    adapted = {name: getattr(opened.settings, name) for name in AdaptSettings.model_fields}
    adapted.pop("model")
    decided_by = (
        _FORMAT,
        str(adapted),
        preprocessing_of(opened),
        weights_digest(opened),
        precision.name,
        precision.device.type,
    )
    return hashlib.blake2b("\n".join(decided_by).encode(), digest_size=16).hexdigest()


def _embed_parts(
    opened: OpenedModel,
    pairs: JoinedParts,
    options: LoaderOptions,
    report: Callable[[int, int], None],
) -> Iterator[Vectors]:
    """Yield the embeddings [images, D] of one part after the other. Batches may span parts."""
    embedded = embed_images(opened, pairs, range(len(pairs)), options)
    for part in pairs.parts:
        rows = list[Vectors | str]()
        for number, row in islice(embedded, part.count):
            rows.append(row)
            report(number + 1, len(pairs))
        width = next((len(row) for row in rows if not isinstance(row, str)), 0)
        undecodable = np.full(width or embedding_width(opened), np.nan, np.float32)
        yield np.stack([undecodable if isinstance(row, str) else row for row in rows])
