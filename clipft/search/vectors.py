"""Embeds images one after the other, and identifies the model and the preprocessing."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.core.errors import DataError
from clipft.data.captions.table import NoCaptions
from clipft.data.decoding import Preprocessing
from clipft.data.images.augmentation import Transform
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
from clipft.data.loader import LoaderOptions, chosen_batches
from clipft.embedding.embed import embed_texts
from clipft.embedding.encoding import evaluation_batch
from clipft.embedding.finite import check_finite_rows
from clipft.runs.load import OpenedModel
from clipft.search.images import JoinedParts

Vector = np.ndarray[Any, np.dtype[np.float32]]
"""One embedding, float32 [D] of unit length."""
Vectors = np.ndarray[Any, np.dtype[np.float32]]
"""Several of them, float32 [N, D]."""


def preprocessing_of(opened: OpenedModel) -> str:
    """Return a text that is equal for models with the same preprocessing of images."""
    inputs = opened.loaded.base.inputs
    return inputs.seen_images


def weights_digest(opened: OpenedModel) -> str:
    """Hash all weights, pretrained and trained."""
    digest = hashlib.blake2b(opened.loaded.fingerprint.encode(), digest_size=16)
    for name, weight in opened.loaded.model.trainable_state().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def embedding_width(opened: OpenedModel) -> int:
    """The number of dimensions of the model's embeddings."""
    return embed_texts(opened.loaded, ["a"]).shape[1]


@torch.inference_mode()
def embed_images(
    opened: OpenedModel, pairs: JoinedParts, numbers: Iterable[int], options: LoaderOptions
) -> Iterator[tuple[int, Vector | str]]:
    """Yield the numbers in order, each with the embedding of its image, or with the reason why the
    image cannot be decoded.

    ``numbers`` may be computed lazily: the next ones are requested while images are embedded.

    Raises:
        DataError: An image was changed or removed in the meantime.
        NotFiniteError: The embedding of an image is not a number.
    """
    inputs, precision = opened.loaded.base.inputs, opened.loaded.precision
    model, asked = opened.loaded.model.eval(), deque[int]()
    batch_size = evaluation_batch(opened.settings, precision.device)
    preprocessing = Preprocessing(
        NoCaptions(), inputs.image_size, "none", 0, inputs.squashed, patches=inputs.patches
    )

    def noted() -> Iterator[int]:
        for number in numbers:
            asked.append(number)
            yield number

    for batch in chosen_batches(pairs, preprocessing, noted(), batch_size, options):
        embedded = dict[int, Vector]()
        if len(batch):  # 0 if no image of the batch can be decoded
            with precision.autocast():
                pixels = batch.pixel_values.to(precision.device, non_blocking=True)
                rows = model.encode_images(pixels).float().cpu()
            check_finite_rows(rows, partial(_name_of, pairs, batch.numbers))
            embedded = dict(zip(batch.numbers, rows.numpy(), strict=True))
        reasons = iter(batch.skipped)  # in the order of the pairs, like everything else
        for _ in range(len(batch.numbers) + len(batch.skipped)):
            number = asked.popleft()
            yield number, embedded[number] if number in embedded else next(reasons).reason


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
    transform = Transform("none", inputs.image_size, inputs.squashed, patches=inputs.patches)
    pixels = transform(image, 0)[None]
    with loaded.precision.autocast():
        vectors = loaded.model.eval().encode_images(pixels.to(loaded.precision.device))
    check_finite_rows(vectors, lambda row: f"the image {name}")
    return vectors[0].float().cpu()
