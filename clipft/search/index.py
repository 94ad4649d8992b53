"""Embeddings of images, made once and then searched by a text or by another image.

Each part of the data has its own file in the cache folder, named by a hash of the model, the
preprocessing and the state of the part. Changed data is embedded again part by part, and an
interrupted search continues where it stopped. The files hold float32 and are memory-mapped:
float16 would halve them but made a query slower, because it has to be converted first.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import AdaptSettings
from clipft.core.common import cache_folder
from clipft.core.errors import DataError
from clipft.core.files import replacing
from clipft.data.captions.table import NoCaptions
from clipft.data.decoding import Preprocessing
from clipft.data.images.augmentation import Transform
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.dataset import RawPair, parse_metadata
from clipft.embedding.embed import embed_texts
from clipft.embedding.finite import check_finite_rows
from clipft.runs.load import OpenedModel
from clipft.search.images import ImagePart

_FORMAT = "1"
_BATCH = 64

Vectors = np.ndarray[Any, np.dtype[np.float32]]


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

    def metadata(self, number: int, /) -> dict[str, Any]:
        """Read the metadata of an image; empty if there is none."""
        return parse_metadata(self[number].metadata)


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
        """Return the ``count`` images with the highest scores; equal scores rank by number.

        Raises:
            DataError: An image was changed or removed in the meantime.
        """
        usable = np.flatnonzero(~np.isnan(scores))
        if count < len(usable):
            # Sorting only those that can win: a partition of millions takes milliseconds
            least = np.partition(scores[usable], -count)[-count]
            usable = usable[scores[usable] >= least]
        ranked = usable[np.argsort(-scores[usable], kind="stable")][:count]
        return [Hit(int(n), float(scores[n]), self.images[int(n)]) for n in ranked]


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
        found[at] = _load(files[at], parts[at].count)  # mapped, so that memory does not fill up
    complete = [vectors for vectors in found if vectors is not None]
    assert len(complete) == len(parts), "a part that was just saved cannot be read"
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
    """Hash all that determines the embedding of an image, except for the image."""
    loaded, inputs = opened.loaded, opened.loaded.base.inputs
    digest = hashlib.blake2b(_FORMAT.encode(), digest_size=16)
    # Not the model's name: its fingerprint says more, and a copy of a model shares the cache
    adapted = {name: getattr(opened.settings, name) for name in AdaptSettings.model_fields}
    adapted.pop("model")
    seen = (
        inputs.image_size,
        inputs.squashed,
        inputs.mean,
        inputs.std,
        loaded.precision.name,
        loaded.fingerprint,
    )
    digest.update(f"{adapted} {seen} {loaded.precision.device.type}".encode())
    for name, weight in loaded.model.trainable_state().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def _embed_parts(
    opened: OpenedModel,
    pairs: JoinedParts,
    options: LoaderOptions,
    report: Callable[[int, int], None],
) -> Iterator[Vectors]:
    """Yield the embeddings [images, D] of one part after the other; batches run across parts."""
    inputs, precision = opened.loaded.base.inputs, opened.loaded.precision
    model = opened.loaded.model.eval()
    preprocessing = Preprocessing(NoCaptions(), inputs.image_size, "none", 0, inputs.squashed)
    batches = evaluation_batches(pairs, preprocessing, _BATCH, options)
    # Rows that are embedded but not yielded yet, and the numbers of their images
    waiting, numbers, done = list[Tensor](), list[int](), 0
    for start, end in zip([0, *pairs.ends], pairs.ends, strict=False):
        while done < end:
            batch = next(batches)
            if len(batch):  # 0 if no image of the batch can be decoded
                with precision.autocast():
                    pixels = batch.pixel_values.to(precision.device, non_blocking=True)
                    embedded = model.encode_images(pixels).float().cpu()
                check_finite_rows(embedded, partial(_name_of, pairs, batch.numbers))
                waiting.append(embedded)
                numbers += batch.numbers
            done = min(done + _BATCH, len(pairs))
            report(done, len(pairs))
        if waiting:
            rows = torch.cat(waiting)
        else:  # no image can be decoded: a text says how wide embeddings are
            rows = torch.empty(0, len(embed_texts(opened.loaded, ["a"])[0]))
        own = bisect_right(numbers, end - 1)
        vectors = np.full((end - start, rows.shape[1]), np.nan, np.float32)
        vectors[np.array(numbers[:own], np.int64) - start] = rows[:own].numpy()
        waiting, numbers = [rows[own:]], numbers[own:]
        yield vectors


def _name_of(pairs: JoinedParts, numbers: Sequence[int], row: int) -> str:
    pair = pairs[numbers[row]]
    return f"the image {pair.key} in {pair.shard}"


@torch.inference_mode()
def embed_image(opened: OpenedModel, data: bytes, name: str) -> Tensor:
    """Embed the bytes of one image: float32 [D] of unit length, on the CPU.

    Raises:
        DataError: The image cannot be decoded.
        NotFiniteError: Its embedding is not a number.
    """
    loaded, inputs = opened.loaded, opened.loaded.base.inputs
    try:
        image = decode_image(data)
    except BadImage as error:
        raise DataError(f"{name}: {error}", "choose another image") from error
    pixels = Transform("none", inputs.image_size, inputs.squashed)(image, 0)[None]
    with loaded.precision.autocast():
        vectors = loaded.model.eval().encode_images(pixels.to(loaded.precision.device))
    check_finite_rows(vectors, lambda row: f"the image {name}")
    return vectors[0].float().cpu()
