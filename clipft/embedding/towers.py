"""The two towers of CLIP in a step: which rows go through a tower, in which chunks.

Pictures go through in the micro-batches they come in. Captions do not have to: a caption that
occurs several times in a step is encoded once, and those of like length go together, so that
hardly any padding is computed. ``Chunks.order`` leads back from the chunks' rows to the pairs.
A tower that does not train and always sees the same does not run at all: its features are
looked up, and what remains of the tower is its projection.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clipft.data.captions.tokenizer import Keys, caption_keys, lengths, stacked
from clipft.data.loader import Batch
from clipft.embedding.dropout import Randomness
from clipft.embedding.feature_cache import Features
from clipft.embedding.load import LoadedModel
from clipft.models.device import Precision
from clipft.models.trainable import TrainableModel

_LEAST_TOKENS = {"cpu": 256, "cuda": 16384}
"""Of a chunk of captions, by device: as many as keep it busy."""


@dataclass(frozen=True)
class Chunk:
    """Rows that go through a tower together. ``keys``, uint64 [rows], tell them apart;
    ``cells`` is what memory grows with: rows, or rows x tokens."""

    number: int
    inputs: Tensor
    keys: Keys
    cells: int


@dataclass(frozen=True)
class Chunks:
    """``order``, int64 [pairs]: the row of each pair of the step among those of all chunks."""

    chunks: Sequence[Chunk]
    order: Tensor


class Chunking(Protocol):
    """Some micro-batches (on the device; none empty) -> one tower's chunks."""

    def __call__(self, micro_batches: Sequence[Batch]) -> Chunks: ...


@dataclass(frozen=True)
class Tower:
    """One tower: how its inputs are cut, and what encodes them to unit rows [rows, D]."""

    name: str
    trainable: bool
    cut: Chunking
    encode_inputs: Callable[[Tensor], Tensor]
    randomness: Randomness
    precision: Precision

    def encode(self, step: int, chunk: Chunk) -> Tensor:
        """float32 [rows, D]; the same again for the same step and chunk."""
        with self.randomness.of(step, chunk.number, chunk.keys), self.precision.autocast():
            return self.encode_inputs(chunk.inputs)

    def backward(self, step: int, chunk: Chunk, rows: Tensor, gradient: Tensor) -> None:
        """Backward from ``rows``, which ``encode`` gave with a graph."""
        with self.randomness.of(step, chunk.number, chunk.keys):
            torch.autograd.backward(rows, gradient)


class EvenOut(Protocol):
    """A step's micro-batches -> those that pass through the towers: where processes must pass
    together, as many as the one has that has most of them, empty ones at the end."""

    def __call__(self, micro_batches: list[Batch]) -> list[Batch]: ...


def _as_they_are(micro_batches: list[Batch]) -> list[Batch]:
    return micro_batches


@dataclass(frozen=True)
class Towers:
    """Images and texts."""

    images: Tower
    texts: Tower
    even_out: EvenOut = _as_they_are


def make_towers(loaded: LoadedModel, seed: int, pad_token_id: int) -> Towers:
    """Both towers at work. ``pad_token_id`` pads the texts."""
    model, precision = loaded.model, loaded.precision
    context = loaded.base.inputs.context_length
    width = context if model.architecture.pads_texts else 0
    least = _LEAST_TOKENS.get(precision.device.type, _LEAST_TOKENS["cuda"])
    cut_texts = _Captions(pad_token_id, width, least)
    images, texts = (
        Randomness(seed, 0, loaded.image_masks),
        Randomness(seed, 1, loaded.text_masks),
    )
    return Towers(
        Tower("images", model.images_trainable, _pictures, model.encode_images, images, precision),
        Tower("texts", model.texts_trainable, cut_texts, model.encode_texts, texts, precision),
    )


def with_image_features(towers: Towers, model: TrainableModel, features: Features) -> Towers:
    """The vision tower's work looked up by the pair's number."""
    cut = _Looked(features, lambda batch: np.asarray(batch.numbers, np.uint64))
    tower = replace(towers.images, cut=cut, encode_inputs=model.project_images)
    return replace(towers, images=tower)


def with_text_features(
    towers: Towers, model: TrainableModel, features: Features, pad_token_id: int
) -> Towers:
    """The text tower's work looked up by the caption."""
    cut = _Looked(features, lambda batch: caption_keys(batch.input_ids, pad_token_id))
    tower = replace(towers.texts, cut=cut, encode_inputs=model.project_texts)
    return replace(towers, texts=tower)


def _pictures(micro_batches: Sequence[Batch]) -> Chunks:
    chunks = [
        Chunk(i, batch.pixel_values, np.asarray(batch.numbers, np.uint64), len(batch))
        for i, batch in enumerate(micro_batches)
    ]
    return Chunks(chunks, torch.arange(sum(chunk.cells for chunk in chunks)))


@dataclass(frozen=True)
class _Captions:
    """Each caption once, shortest first, in chunks of at most a micro-batch's rows; filled to
    ``width`` tokens where it is not 0, else cut at the longest of the chunk."""

    pad_token_id: int
    width: int
    least: int

    def __call__(self, micro_batches: Sequence[Batch]) -> Chunks:
        if not micro_batches:
            return Chunks([], torch.arange(0))
        ids = stacked([b.input_ids for b in micro_batches], self.pad_token_id, self.width)
        keys, first, which = np.unique(
            caption_keys(ids, self.pad_token_id), return_index=True, return_inverse=True
        )
        once = ids[torch.from_numpy(first).to(ids.device)]
        needed = self.width or lengths(once, self.pad_token_id).cpu().numpy() + 1
        ranked = np.lexsort((keys, np.broadcast_to(needed, len(keys))))
        longest = np.minimum(np.broadcast_to(needed, len(keys)), ids.shape[1])[ranked]
        most = max(len(batch) for batch in micro_batches)
        chunks = list[Chunk]()
        for start, end in _spans(longest, most, self.least):
            among, tokens = ranked[start:end], int(longest[end - 1])
            inputs = once[torch.from_numpy(among).to(ids.device)][:, :tokens]
            chunks.append(Chunk(len(chunks), inputs, keys[among], len(among) * tokens))
        place = np.empty(len(ranked), np.int64)
        place[ranked] = np.arange(len(ranked))
        return Chunks(chunks, torch.from_numpy(place[which]).to(ids.device))


def _spans(lengths: "np.ndarray[Any, Any]", most: int, least: int) -> Iterator[tuple[int, int]]:
    """Chunking rows of rising length into chunks of at most ``most`` rows: where the length rises,
    once a chunk has ``least`` tokens."""
    start = 0
    for end in range(1, len(lengths) + 1):
        tokens = (end - start) * int(lengths[end - 1])
        rises = end < len(lengths) and lengths[end] > lengths[end - 1]
        if end == len(lengths) or end - start == most or (rises and tokens >= least):
            yield start, end
            start = end


@dataclass(frozen=True)
class _Looked:
    """All rows of the step as one chunk: what remains is a projection."""

    features: Features
    keys_of: Callable[[Batch], Keys]

    def __call__(self, micro_batches: Sequence[Batch]) -> Chunks:
        if not micro_batches:
            return Chunks([], torch.arange(0))
        keys = np.concatenate([self.keys_of(batch) for batch in micro_batches])
        rows = self.features.rows(keys).to(micro_batches[0].input_ids.device)
        return Chunks([Chunk(0, rows, keys, len(rows))], torch.arange(len(rows)))
