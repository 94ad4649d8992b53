"""The two towers of CLIP during a step: which rows pass through a tower, and in which chunks.

Images pass in the loader's micro-batches. Captions are regrouped: a caption that occurs several
times in a step is encoded once, and captions of similar length are in the same chunk, so that there
is hardly any padding. ``Chunks.order`` maps the rows of the chunks back to the pairs. A frozen
tower whose inputs do not change does not run at all: its features are looked up, and only its
projection is computed.

Chunks are cut from tensors on the CPU, and ``Tower.encode`` moves each to the device when needed.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipft.core.errors import UsageError
from clipft.data.batch import Batch
from clipft.data.captions.tokenizer import Keys, caption_keys, lengths, stacked
from clipft.data.images.augmentation import augment
from clipft.embedding.feature_cache import Features
from clipft.embedding.load import LoadedModel
from clipft.embedding.transfer import Transfer
from clipft.models.device import Precision
from clipft.models.dropout import RowMasks
from clipft.models.trainable import TrainableModel

_MIN_TOKENS = 256
"""Enough tokens in a chunk of captions for a CPU. Above this, chunks are split by length."""
_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Lengths to which captions are padded if shapes are bounded, besides the context length."""
_IMAGE_PARTS = 4
_CAPTION_PARTS = 16
_FEWEST_CAPTIONS = 32


@dataclass(frozen=True)
class Shapes:
    """The shapes that the chunks of a run may have. This base class allows any shape.

    A CPU is equally fast for all shapes, so it is best not to pad there.
    """

    def image_rows(self, rows: int) -> int:
        """Return the number of rows to which a chunk of images is filled up."""
        return rows

    def cut_captions(
        self, tokens: "np.ndarray[Any, Any]", max_rows: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Cut captions, sorted by length, into chunks: (start, end, rows, tokens) of each.

        A chunk has at most ``max_rows`` captions. It also ends where the length increases, once it
        has ``_MIN_TOKENS`` tokens.
        """
        start = 0
        for end in range(1, len(tokens) + 1):
            cells = (end - start) * int(tokens[end - 1])
            rises = end < len(tokens) and tokens[end] > tokens[end - 1]
            if end == len(tokens) or end - start == max_rows or (rises and cells >= _MIN_TOKENS):
                yield start, end, end - start, int(tokens[end - 1])
                start = end


@dataclass(frozen=True)
class BoundedShapes(Shapes):
    """At most 16 shapes in a whole run: 4 of images, and 12 of captions.

    CUDA's attention kernels are set up for each new shape, and a compiled tower is compiled again.
    The cost is padding: with furniture captions, there are 17% more tokens in steps of 1,024 pairs,
    and 26% more in steps of 256.

    ``micro`` is the size of a micro-batch, ``effective`` is the number of pairs that a process has
    in a step, and ``context`` is the model's context length in tokens.
    """

    micro: int
    effective: int
    context: int

    @property
    def caption_rows(self) -> int:
        """The number of rows in every chunk of captions."""
        return min(self.micro, max(_FEWEST_CAPTIONS, -(-self.effective // _CAPTION_PARTS)))

    def image_rows(self, rows: int) -> int:
        unit = -(-self.micro // _IMAGE_PARTS)
        return max(rows, min(self.micro, -(-rows // unit) * unit))

    def cut_captions(
        self, tokens: "np.ndarray[Any, Any]", max_rows: int
    ) -> Iterator[tuple[int, int, int, int]]:
        rows = self.caption_rows
        while rows >= 2 * max_rows:  # micro-batches were halved because memory ran out
            rows = -(-rows // 2)
        allowed = [length for length in _LENGTHS if length < self.context] + [self.context]
        # Only the first chunk, with the shortest captions, is filled up
        ends = range(len(tokens), 0, -rows)
        for end in reversed(ends):
            longest = int(tokens[end - 1])
            length = next((length for length in allowed if length >= longest), longest)
            yield max(0, end - rows), end, rows, length


def choose_shapes(loaded: LoadedModel, compiled: bool, micro: int, effective: int) -> Shapes:
    """Bound the shapes if each new shape takes time: on CUDA, and if towers are compiled."""
    if loaded.precision.device.type == "cuda" or compiled:
        return BoundedShapes(micro, effective, loaded.base.inputs.context_length)
    return Shapes()


@dataclass(frozen=True)
class Chunk:
    """Rows that pass through a tower together.

    ``inputs`` may have more rows than ``rows``, to fill up a shape; their embeddings are dropped.
    ``keys``, uint64, identify all rows. Memory grows with ``cells``: the number of rows, or of
    rows x tokens. ``shifts`` is the augmentation that ``augment`` still has to apply to images.
    """

    inputs: Tensor
    keys: Keys
    rows: int
    cells: int
    shifts: Tensor | None = None


@dataclass(frozen=True)
class Chunks:
    """The chunks of a step. ``order``, int64 [pairs], is each pair's row among those of all
    chunks."""

    chunks: Sequence[Chunk]
    order: Tensor


Chunking = Callable[[Sequence[Batch]], Chunks]
"""Splits micro-batches (none empty) into the chunks of one tower."""


@dataclass(frozen=True)
class Tower:
    """One tower: ``make_chunks`` splits its inputs, and ``encode_inputs`` encodes a chunk's
    inputs into unit rows [rows, D].

    ``trainable`` is true if its embeddings change in training. ``masks`` are its dropout masks, for
    rows of ``positions`` positions or of as many as a chunk has tokens. They depend on ``seed``.
    """

    name: str
    trainable: bool
    make_chunks: Chunking
    encode_inputs: Callable[[Tensor], Tensor]
    precision: Precision
    transfer: Transfer
    seed: int = 0
    masks: RowMasks | None = None
    positions: int | None = None

    def encode(self, step: int, chunk: Chunk) -> Tensor:
        """Encode a chunk into float32 [rows, D]. The same step and chunk give the same result."""
        inputs = self.transfer.take(chunk.inputs)
        if chunk.shifts is not None:
            inputs = augment(inputs, chunk.shifts.to(self.precision.device, non_blocking=True))
        self.use_masks(step, chunk)
        with self.precision.autocast(), _attention(self.precision.device):
            return self.encode_inputs(inputs)[: chunk.rows]

    def use_masks(self, step: int, chunk: Chunk) -> None:
        """Draw the dropout masks of a chunk in a step.

        With gradient checkpointing, call this before a backward pass too, because it repeats parts
        of the forward pass.
        """
        if self.masks:
            positions = self.positions or chunk.inputs.shape[1]
            tower = ("images", "texts").index(self.name)
            self.masks.use((self.seed, step, tower), chunk.keys, positions)


def _attention(device: torch.device) -> AbstractContextManager[Any]:
    """Choose the attention kernels for the towers on CUDA.

    On Hopper cards torch 2.15 prefers cuDNN's attention, which makes a new plan for every shape.
    Both towers have short rows, for which it is hardly faster. So flash attention is preferred, and
    others are used only if it does not apply: for fp32, and for the mask of the pooled layer.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


@dataclass(frozen=True)
class Towers:
    """Both towers."""

    images: Tower
    texts: Tower


def make_towers(
    loaded: LoadedModel,
    seed: int,
    pad_token_id: int,
    shapes: Shapes = Shapes(),
    compiled: bool = False,
) -> Towers:
    """Return both towers of a model, without cached features. ``pad_token_id`` pads the texts.

    ``compiled`` towers are compiled for each shape of their inputs.
    """
    model, inputs = loaded.model, loaded.base.inputs
    width = inputs.context_length if model.architecture.pads_texts else 0
    transfer = Transfer(loaded.precision.device)
    encode_images, encode_texts = model.encode_images, model.encode_texts
    if compiled:
        _check_compiler()
        encode_images = torch.compile(encode_images, dynamic=False)
        encode_texts = torch.compile(encode_texts, dynamic=False)
    chunk_texts = partial(_chunk_captions, pad_token_id=pad_token_id, width=width, shapes=shapes)
    return Towers(
        Tower(
            name="images",
            trainable=model.images_trainable,
            make_chunks=partial(_chunk_images, shapes=shapes),
            encode_inputs=encode_images,
            precision=loaded.precision,
            transfer=transfer,
            seed=seed,
            masks=loaded.image_masks,
            positions=model.image_positions,
        ),
        Tower(
            name="texts",
            trainable=model.texts_trainable,
            make_chunks=chunk_texts,
            encode_inputs=encode_texts,
            precision=loaded.precision,
            transfer=transfer,
            seed=seed,
            masks=loaded.text_masks,
            positions=width or None,
        ),
    )


def _check_compiler() -> None:
    """Check that there is a C++ compiler, which torch needs to compile towers on any device.

    Raises:
        UsageError: there is none.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UsageError(
            "--compile needs a C++ compiler, and there is no c++, g++ or clang++ on the PATH",
            "install one (on Debian and Ubuntu: apt install g++), or run without --compile",
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
    """Look up all rows of the step as one chunk, because only the projection is computed."""
    if not micro_batches:
        return Chunks([], torch.arange(0))
    keys = np.concatenate([keys_of(batch) for batch in micro_batches])
    rows = features.rows(keys)
    return Chunks([Chunk(rows, keys, len(rows), len(rows))], torch.arange(len(rows)))


def _chunk_images(micro_batches: Sequence[Batch], shapes: Shapes) -> Chunks:
    chunks = list[Chunk]()
    for batch in micro_batches:
        pixels, shifts = batch.pixel_values, batch.shifts
        keys, rows = np.asarray(batch.numbers, np.uint64), shapes.image_rows(len(batch))
        if rows > len(batch):
            chosen = torch.arange(rows) % len(batch)  # fill up with repeated rows
            pixels, keys = pixels[chosen], keys[chosen.numpy()]
            shifts = None if shifts is None else shifts[chosen]
        chunks.append(Chunk(pixels, keys, len(batch), rows, shifts))
    return Chunks(chunks, torch.arange(sum(chunk.rows for chunk in chunks)))


def _chunk_captions(
    micro_batches: Sequence[Batch], pad_token_id: int, width: int, shapes: Shapes
) -> Chunks:
    """Put each distinct caption, the shortest first, into chunks of at most a micro-batch's rows.

    Captions are padded to ``width`` tokens or, if it is 0, to the longest in their chunk.
    """
    if not micro_batches:
        return Chunks([], torch.arange(0))
    ids = stacked([batch.input_ids for batch in micro_batches], pad_token_id, width)
    keys, first, which = np.unique(
        caption_keys(ids, pad_token_id), return_index=True, return_inverse=True
    )
    once = ids[torch.from_numpy(first)]
    needed = np.minimum(lengths(once, pad_token_id).numpy() + 1, ids.shape[1])
    if width:
        needed = np.full(len(keys), width)
    ranked = np.lexsort((keys, needed))
    max_rows = max(len(batch) for batch in micro_batches)
    chunks = list[Chunk]()
    for start, end, rows, tokens in shapes.cut_captions(needed[ranked], max_rows):
        chosen = np.resize(ranked[start:end], rows)
        inputs = once[torch.from_numpy(chosen)][:, :tokens]
        inputs = functional.pad(inputs, (0, tokens - inputs.shape[1]), value=pad_token_id)
        chunks.append(Chunk(inputs, keys[chosen], end - start, rows * tokens))
    row = np.empty(len(ranked), np.int64)
    row[ranked] = np.arange(len(ranked))
    return Chunks(chunks, torch.from_numpy(row[which]))
