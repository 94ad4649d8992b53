"""The two sides of CLIP in a step: which rows go through a tower, in which pieces.

Pictures go through in the micro-batches they come in. Captions do not have to: a caption that
occurs several times in a step is encoded once, and those of like length go together, so that
hardly any padding is computed. ``Pieces.order`` leads back from the pieces' rows to the pairs.
A tower that does not train and always sees the same does not run at all: its features are
looked up, and what remains of the side is its projection.
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
"""Of a piece of captions, by device: as many as keep it busy."""


@dataclass(frozen=True)
class Piece:
    """Rows that go through a tower together. ``keys``, uint64 [rows], tell them apart;
    ``cells`` is what memory grows with: rows, or rows x tokens."""

    number: int
    inputs: Tensor
    keys: Keys
    cells: int


@dataclass(frozen=True)
class Pieces:
    """``order``, int64 [pairs]: the row of each pair of the step among those of all pieces."""

    pieces: Sequence[Piece]
    order: Tensor


class Cut(Protocol):
    """Some micro-batches (on the device; none empty) -> one side's pieces."""

    def __call__(self, micro_batches: Sequence[Batch]) -> Pieces: ...


@dataclass(frozen=True)
class Side:
    """One side: how its inputs are cut, and what encodes them to unit rows [rows, D]."""

    name: str
    learns: bool
    cut: Cut
    encode_inputs: Callable[[Tensor], Tensor]
    randomness: Randomness
    precision: Precision

    def encode(self, step: int, piece: Piece) -> Tensor:
        """float32 [rows, D]; the same again for the same step and piece."""
        with self.randomness.of(step, piece.number, piece.keys), self.precision.autocast():
            return self.encode_inputs(piece.inputs)

    def push_back(self, step: int, piece: Piece, rows: Tensor, gradient: Tensor) -> None:
        """Backward from ``rows``, which ``encode`` gave with a graph."""
        with self.randomness.of(step, piece.number, piece.keys):
            torch.autograd.backward(rows, gradient)


class EvenOut(Protocol):
    """A step's micro-batches -> those that pass through the towers: where processes must pass
    together, as many as the one has that has most of them, empty ones at the end."""

    def __call__(self, micro_batches: list[Batch]) -> list[Batch]: ...


def _as_they_are(micro_batches: list[Batch]) -> list[Batch]:
    return micro_batches


@dataclass(frozen=True)
class Sides:
    """Images and texts."""

    images: Side
    texts: Side
    even_out: EvenOut = _as_they_are


def make_sides(loaded: LoadedModel, seed: int, fill: int) -> Sides:
    """Both towers at work. ``fill`` is the id that texts are filled with."""
    model, precision = loaded.model, loaded.precision
    context = loaded.base.inputs.context_length
    width = context if model.architecture.fills_texts else 0
    least = _LEAST_TOKENS.get(precision.device.type, _LEAST_TOKENS["cuda"])
    cut_texts = _Captions(fill, width, least)
    images, texts = (
        Randomness(seed, 0, loaded.masks.images),
        Randomness(seed, 1, loaded.masks.texts),
    )
    return Sides(
        Side("images", model.learns_images, _pictures, model.encode_images, images, precision),
        Side("texts", model.learns_texts, cut_texts, model.encode_texts, texts, precision),
    )


def with_image_features(sides: Sides, model: TrainableModel, features: Features) -> Sides:
    """The vision tower's work looked up by the pair's number."""
    cut = _Looked(features, lambda batch: np.asarray(batch.numbers, np.uint64))
    side = replace(sides.images, cut=cut, encode_inputs=model.project_images)
    return replace(sides, images=side)


def with_text_features(sides: Sides, model: TrainableModel, features: Features, fill: int) -> Sides:
    """The text tower's work looked up by the caption."""
    cut = _Looked(features, lambda batch: caption_keys(batch.input_ids, fill))
    side = replace(sides.texts, cut=cut, encode_inputs=model.project_texts)
    return replace(sides, texts=side)


def _pictures(micro_batches: Sequence[Batch]) -> Pieces:
    pieces = [
        Piece(i, batch.pixel_values, np.asarray(batch.numbers, np.uint64), len(batch))
        for i, batch in enumerate(micro_batches)
    ]
    return Pieces(pieces, torch.arange(sum(piece.cells for piece in pieces)))


@dataclass(frozen=True)
class _Captions:
    """Each caption once, shortest first, in pieces of at most a micro-batch's rows; filled to
    ``width`` tokens where it is not 0, else cut at the longest of the piece."""

    fill: int
    width: int
    least: int

    def __call__(self, micro_batches: Sequence[Batch]) -> Pieces:
        if not micro_batches:
            return Pieces([], torch.arange(0))
        ids = stacked([b.input_ids for b in micro_batches], self.fill, self.width)
        keys, first, which = np.unique(
            caption_keys(ids, self.fill), return_index=True, return_inverse=True
        )
        once = ids[torch.from_numpy(first).to(ids.device)]
        needed = self.width or lengths(once, self.fill).cpu().numpy() + 1
        ranked = np.lexsort((keys, np.broadcast_to(needed, len(keys))))
        longest = np.minimum(np.broadcast_to(needed, len(keys)), ids.shape[1])[ranked]
        most = max(len(batch) for batch in micro_batches)
        pieces = list[Piece]()
        for start, end in _spans(longest, most, self.least):
            among, tokens = ranked[start:end], int(longest[end - 1])
            inputs = once[torch.from_numpy(among).to(ids.device)][:, :tokens]
            pieces.append(Piece(len(pieces), inputs, keys[among], len(among) * tokens))
        place = np.empty(len(ranked), np.int64)
        place[ranked] = np.arange(len(ranked))
        return Pieces(pieces, torch.from_numpy(place[which]).to(ids.device))


def _spans(lengths: "np.ndarray[Any, Any]", most: int, least: int) -> Iterator[tuple[int, int]]:
    """Cut rows of rising length into pieces of at most ``most`` rows: where the length rises,
    once a piece has ``least`` tokens."""
    start = 0
    for end in range(1, len(lengths) + 1):
        tokens = (end - start) * int(lengths[end - 1])
        rises = end < len(lengths) and lengths[end] > lengths[end - 1]
        if end == len(lengths) or end - start == most or (rises and tokens >= least):
            yield start, end
            start = end


@dataclass(frozen=True)
class _Looked:
    """All rows of the step as one piece: what remains is a projection."""

    features: Features
    keys_of: Callable[[Batch], Keys]

    def __call__(self, micro_batches: Sequence[Batch]) -> Pieces:
        if not micro_batches:
            return Pieces([], torch.arange(0))
        keys = np.concatenate([self.keys_of(batch) for batch in micro_batches])
        rows = self.features.rows(keys).to(micro_batches[0].input_ids.device)
        return Pieces([Piece(0, rows, keys, len(rows))], torch.arange(len(rows)))
