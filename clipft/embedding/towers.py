"""The two towers of CLIP during a step: which rows pass through a tower, and in which chunks.

Images pass in the micro-batches in which they come. Captions do not have to. A caption that
occurs several times in a step is encoded once, and captions of similar length go together, so
that hardly any padding is computed. ``Chunks.order`` leads from the chunks' rows back to the
pairs. A frozen tower whose inputs do not change does not run at all: its features are looked up,
and only its projection remains.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.data.augmentation import augment
from clipft.data.captions.tokenizer import Keys, caption_keys, lengths, stacked
from clipft.data.loader import Batch
from clipft.embedding.dropout import Randomness
from clipft.embedding.feature_cache import Features
from clipft.embedding.load import LoadedModel
from clipft.models.device import Precision
from clipft.models.trainable import TrainableModel

_MIN_TOKENS = {"cpu": 256, "cuda": 16384}
"""Tokens in a chunk of captions that keep a device busy: above this, chunks split by length."""


@dataclass(frozen=True)
class Chunk:
    """Rows that pass through a tower together.

    ``keys``, uint64 [rows], identify the rows. Memory grows with ``cells``: the number of rows,
    or of rows x tokens.
    """

    number: int
    inputs: Tensor
    keys: Keys
    cells: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of a step. ``order``, int64 [pairs], is each pair's row among those of all
    chunks."""

    chunks: Sequence[Chunk]
    order: Tensor


Chunking = Callable[[Sequence[Batch]], Chunks]
"""Splits micro-batches (on the device, none empty) into the chunks of one tower."""


@dataclass(frozen=True)
class Tower:
    """One tower: ``make_chunks`` splits its inputs, and ``encode_inputs`` encodes a chunk's
    inputs into unit rows [rows, D]. ``trainable`` is true if its embeddings change in training."""

    name: str
    trainable: bool
    make_chunks: Chunking
    encode_inputs: Callable[[Tensor], Tensor]
    randomness: Randomness
    precision: Precision

    def encode(self, step: int, chunk: Chunk) -> Tensor:
        """Encode a chunk into float32 [rows, D]; the same again for the same step and chunk."""
        with self.randomness.seeded(step, chunk.number, chunk.keys), self.precision.autocast():
            return self.encode_inputs(chunk.inputs)

    def backward(self, step: int, chunk: Chunk, rows: Tensor, gradient: Tensor) -> None:
        """Run the backward pass from ``rows``, which ``encode`` returned with their graph."""
        with self.randomness.seeded(step, chunk.number, chunk.keys):
            torch.autograd.backward(rows, gradient)


@dataclass(frozen=True)
class Towers:
    """Both towers.

    ``even_out`` pads a step's micro-batches with empty ones where all processes must pass
    equally many through the towers.
    """

    images: Tower
    texts: Tower
    even_out: Callable[[list[Batch]], list[Batch]] = lambda micro_batches: micro_batches


def make_towers(loaded: LoadedModel, seed: int, pad_token_id: int) -> Towers:
    """Return both towers of a model, both of them running. ``pad_token_id`` pads the texts."""
    model, precision = loaded.model, loaded.precision
    width = loaded.base.inputs.context_length if model.architecture.pads_texts else 0
    min_tokens = _MIN_TOKENS.get(precision.device.type, _MIN_TOKENS["cuda"])
    chunk_texts = partial(
        _chunk_captions, pad_token_id=pad_token_id, width=width, min_tokens=min_tokens
    )
    return Towers(
        Tower(
            "images",
            model.images_trainable,
            _chunk_images,
            model.encode_images,
            Randomness(seed, 0, loaded.image_masks),
            precision,
        ),
        Tower(
            "texts",
            model.texts_trainable,
            chunk_texts,
            model.encode_texts,
            Randomness(seed, 1, loaded.text_masks),
            precision,
        ),
    )


def with_image_features(towers: Towers, model: TrainableModel, features: Features) -> Towers:
    """Replace the vision tower by cached features, looked up by the pair's number."""
    look_up = partial(
        _look_up,
        features=features,
        keys_of=lambda batch: np.asarray(batch.numbers, np.uint64),
    )
    tower = replace(towers.images, make_chunks=look_up, encode_inputs=model.project_images)
    return replace(towers, images=tower)


def with_text_features(
    towers: Towers, model: TrainableModel, features: Features, pad_token_id: int
) -> Towers:
    """Replace the text tower by cached features, looked up by the caption."""
    look_up = partial(
        _look_up,
        features=features,
        keys_of=lambda batch: caption_keys(batch.input_ids, pad_token_id),
    )
    tower = replace(towers.texts, make_chunks=look_up, encode_inputs=model.project_texts)
    return replace(towers, texts=tower)


def _look_up(
    micro_batches: Sequence[Batch], features: Features, keys_of: Callable[[Batch], Keys]
) -> Chunks:
    """Look up all rows of the step as one chunk, for a projection is all that remains."""
    if not micro_batches:
        return Chunks([], torch.arange(0))
    keys = np.concatenate([keys_of(batch) for batch in micro_batches])
    rows = features.rows(keys).to(micro_batches[0].input_ids.device)
    return Chunks([Chunk(0, rows, keys, len(rows))], torch.arange(len(rows)))


def _chunk_images(micro_batches: Sequence[Batch]) -> Chunks:
    chunks = [
        Chunk(
            i,
            augment(batch.pixel_values, batch.shifts),
            np.asarray(batch.numbers, np.uint64),
            len(batch),
        )
        for i, batch in enumerate(micro_batches)
    ]
    return Chunks(chunks, torch.arange(sum(chunk.cells for chunk in chunks)))


def _chunk_captions(
    micro_batches: Sequence[Batch], pad_token_id: int, width: int, min_tokens: int
) -> Chunks:
    """Put each caption once, the shortest first, into chunks of at most a micro-batch's rows.

    With ``width``, each caption is padded to so many tokens; with 0, to the longest of its chunk.
    """
    if not micro_batches:
        return Chunks([], torch.arange(0))
    ids = stacked([b.input_ids for b in micro_batches], pad_token_id, width)
    keys, first, which = np.unique(
        caption_keys(ids, pad_token_id), return_index=True, return_inverse=True
    )
    once = ids[torch.from_numpy(first).to(ids.device)]
    needed = width or lengths(once, pad_token_id).cpu().numpy() + 1
    ranked = np.lexsort((keys, np.broadcast_to(needed, len(keys))))
    tokens = np.minimum(np.broadcast_to(needed, len(keys)), ids.shape[1])[ranked]
    max_rows = max(len(batch) for batch in micro_batches)
    chunks = list[Chunk]()
    for start, end in _spans(tokens, max_rows, min_tokens):
        chosen, longest = ranked[start:end], int(tokens[end - 1])
        inputs = once[torch.from_numpy(chosen).to(ids.device)][:, :longest]
        chunks.append(Chunk(len(chunks), inputs, keys[chosen], len(chosen) * longest))
    row = np.empty(len(ranked), np.int64)
    row[ranked] = np.arange(len(ranked))
    return Chunks(chunks, torch.from_numpy(row[which]).to(ids.device))


def _spans(
    tokens: "np.ndarray[Any, Any]", max_rows: int, min_tokens: int
) -> Iterator[tuple[int, int]]:
    """Split rows of rising length into spans of at most ``max_rows`` rows.

    A span also ends where the length rises, once it has ``min_tokens`` tokens.
    """
    start = 0
    for end in range(1, len(tokens) + 1):
        cells = (end - start) * int(tokens[end - 1])
        rises = end < len(tokens) and tokens[end] > tokens[end - 1]
        if end == len(tokens) or end - start == max_rows or (rises and cells >= min_tokens):
            yield start, end
            start = end
