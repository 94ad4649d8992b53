"""Embeddings of pictures, made once and searched by a text or another picture.

Each part of the data has a file of its own in the cache folder, named by a hash of the model,
the preprocessing and the part's state: changed data is embedded anew part by part, and what a
kill left is used. float32, mapped: half the bytes in float16 made a query slower, because it
has to be converted first.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from clipft.data.augmentation import make_transform
from clipft.data.captions.table import NoCaptions
from clipft.data.images import BadImage, decode_image
from clipft.data.loader import LoaderOptions, Preprocessing, evaluation_batches
from clipft.data.shards.dataset import RawPair
from clipft.embedding.embed import embed_texts
from clipft.runs.load import OpenedModel
from clipft.search.images import PicturePart

_FORMAT = "1"
_BATCH = 64

Vectors = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Hit:
    """One found picture; ``number`` counts over all parts."""

    number: int
    score: float
    pair: RawPair


@dataclass(frozen=True)
class PictureIndex:
    """Unit rows [pictures, D] by part; a picture that cannot be used is a row of NaN."""

    parts: Sequence[PicturePart]
    vectors: Sequence[Vectors]
    embedded: int
    """Pictures that were not in the cache."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def scores(self, query: Tensor) -> Vectors:
        """The cosine [pictures] of each with a unit vector [D]; NaN where it cannot be used."""
        vector = query.numpy()
        return np.concatenate([np.asarray(rows) @ vector for rows in self.vectors])

    def best(self, scores: Vectors, count: int) -> list[Hit]:
        """The ``count`` greatest of ``scores``, the first of equal ones first.

        Raises:
            DataError: a picture was changed or removed meanwhile.
        """
        usable = np.flatnonzero(~np.isnan(scores))
        if count < len(usable):
            least = np.partition(scores[usable], -count)[-count]
            usable = usable[scores[usable] >= least]
        ranked = usable[np.argsort(-scores[usable], kind="stable")][:count]
        all_pairs = _Joined(self.parts)
        return [Hit(int(n), float(scores[n]), all_pairs[int(n)]) for n in ranked]


def open_index(
    opened: OpenedModel,
    parts: Sequence[PicturePart],
    options: LoaderOptions,
    report: Callable[[int, int], None],
) -> PictureIndex:
    """All parts' embeddings, those missing made now; ``report`` is told (done, to do).

    Raises:
        DataError: a picture was changed or removed meanwhile.
        StorageError: the cache folder has no room.
    """
    model_key = _model_key(opened)
    files = [_file_of(model_key, part) for part in parts]
    found = [_load(file, len(part)) for file, part in zip(files, parts, strict=True)]
    missing = [at for at, vectors in enumerate(found) if vectors is None]
    to_do = _Joined([parts[at] for at in missing])
    made = _embedded(opened, to_do, options, report)
    for at, vectors in zip(missing, made, strict=True):
        with replacing(files[at], shared=True) as temporary, temporary.open("wb") as file:
            np.save(file, vectors)
        found[at] = _load(files[at], len(parts[at]))
    whole = [vectors for vectors in found if vectors is not None]
    assert len(whole) == len(parts), "a part that was just saved cannot be read"
    return PictureIndex(parts, whole, len(to_do))


def _file_of(model_key: str, part: PicturePart) -> Path:
    name = hashlib.sha256(part.state.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / "pictures" / model_key / f"{name}.npy"


def _load(file: Path, rows: int) -> Vectors | None:
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = vectors.ndim == 2 and len(vectors) == rows and vectors.dtype == np.float32
    return vectors if usable else None


def _model_key(opened: OpenedModel) -> str:
    """All that decides a picture's embedding but the picture."""
    loaded, inputs = opened.loaded, opened.loaded.base.inputs
    digest = hashlib.blake2b(_FORMAT.encode(), digest_size=16)
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


@dataclass(frozen=True)
class _Joined:
    """Several parts, numbered through."""

    parts: Sequence[PicturePart]

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.parts else 0

    def __getitem__(self, number: int, /) -> RawPair:
        which = bisect_right(self.ends, number)
        pair = self.parts[which][number - (self.ends[which - 1] if which else 0)]
        return RawPair(number, pair.key, pair.shard, pair.image, pair.caption, pair.metadata)


@torch.inference_mode()
def _embedded(
    opened: OpenedModel,
    pairs: _Joined,
    options: LoaderOptions,
    report: Callable[[int, int], None],
) -> Iterator[Vectors]:
    """The embeddings of one part after the other."""
    inputs, precision = opened.loaded.base.inputs, opened.loaded.precision
    model = opened.loaded.model.eval()
    preprocessing = Preprocessing(NoCaptions(), inputs.image_size, "none", 0, inputs.squashed)
    batches = evaluation_batches(pairs, preprocessing, _BATCH, options)
    waiting, numbers, done = list[Tensor](), list[int](), 0
    ends = pairs.ends
    for start, end in zip([0, *ends], ends, strict=False):
        while done < end:
            batch = next(batches)
            if len(batch):
                with precision.autocast():
                    pixels = batch.pixel_values.to(precision.device, non_blocking=True)
                    waiting.append(model.encode_images(pixels).float().cpu())
                numbers += batch.numbers
            done = min(done + _BATCH, len(pairs))
            report(done, len(pairs))
        rows = torch.cat(waiting) if waiting else torch.empty(0, _width(opened))
        own = bisect_right(numbers, end - 1)
        vectors = np.full((end - start, rows.shape[1]), np.nan, np.float32)
        vectors[np.array(numbers[:own], np.int64) - start] = rows[:own].numpy()
        waiting, numbers = [rows[own:]], numbers[own:]
        yield vectors


def _width(opened: OpenedModel) -> int:
    """Of an embedding, where no picture has given one."""
    return len(embed_texts(opened.loaded, ["a"])[0])


@torch.inference_mode()
def embed_picture(opened: OpenedModel, data: bytes, name: str) -> Tensor:
    """Of the bytes of a picture: float32 [D] of unit length, on the CPU.

    Raises:
        DataError: it cannot be decoded.
    """
    loaded = opened.loaded
    try:
        image = decode_image(data)
    except BadImage as error:
        raise DataError(f"{name}: {error}", "choose another picture") from error
    inputs = loaded.base.inputs
    pixels = make_transform("none", inputs.image_size, inputs.squashed)(image, 0)[None]
    with loaded.precision.autocast():
        return (
            loaded.model.eval().encode_images(pixels.to(loaded.precision.device))[0].float().cpu()
        )
