"""Dropout whose masks belong to the rows, not to the batches.

The mask of a row is a function of (seed, step, tower, the row's key): the same whichever
micro-batch, chunk or process the row is in, so a second pass draws the masks of the first,
and nothing about randomness has to be saved or restored. On a CPU the masks come from numpy's
SFC64, row by row, at about a fifth of the time of torch's generator; on other devices torch
draws them, seeded per chunk, so there they belong to the chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipft.data.captions.tokenizer import Keys
from clipft.data.order import derived_seed

_LEVELS = 1 << 16
"""Masks are drawn with 16 bits a value."""


class RowMasks:
    """The masks of one tower's dropouts for the rows that are going through it."""

    def __init__(self, p: float) -> None:
        self._limit = np.uint16(round(p * _LEVELS))
        self.scale = 1 / (1 - int(self._limit) / _LEVELS)
        self.width = 0
        self._seed: tuple[int, ...] = ()
        self._keys: Keys | None = None
        self._drawn: Tensor | None = None

    def join(self, width: int) -> slice:
        """Room for one more dropout over ``width`` values."""
        self.width += width
        return slice(self.width - width, self.width)

    def use(self, seed: tuple[int, ...], keys: Keys) -> None:
        """From now on: rows with these keys, uint64 [rows]."""
        self._seed, self._keys, self._drawn = seed, keys, None

    def kept(self, positions: int) -> Tensor:
        """bool [rows, positions, width]: which values of the current rows stay."""
        if self._drawn is None or positions > self._drawn.shape[1]:
            self._drawn = torch.from_numpy(self._draw(positions))
        return self._drawn[:, :positions]

    def _draw(self, positions: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        # Position by position, so that a longer row begins as the shorter one does
        assert self._keys is not None, "rows without keys"
        values = positions * self.width
        kept = np.empty((len(self._keys), values), np.bool_)
        for row, key in zip(kept, self._keys.tolist(), strict=True):
            source = np.random.SFC64(np.random.SeedSequence((*self._seed, key)))
            drawn = np.asarray(source.random_raw(-(-values // 4))).view(np.uint16)
            np.greater_equal(drawn[:values], self._limit, out=row)
        return kept.reshape(len(kept), positions, self.width)


class RowDropout(nn.Module):
    """Takes the place of ``nn.Dropout`` before an adapter. Over [rows, positions, width]."""

    def __init__(self, width: int, masks: RowMasks) -> None:
        super().__init__()
        self._masks, self._slice = masks, masks.join(width)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        kept = self._masks.kept(values.shape[1])[..., self._slice]
        dropped: Tensor = _Dropped.apply(values, kept, self._masks.scale)
        return dropped


class _Dropped(torch.autograd.Function):
    """values * kept * scale in one new tensor each way: memory's first touch is what it costs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.where(kept, values, 0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradients[0], 0).mul_(ctx.scale), None, None


class Randomness:
    """All that is random while a tower works: set before each pass of each chunk."""

    def __init__(self, seed: int, tower: int, masks: RowMasks | None) -> None:
        self._seed, self._tower, self._masks = seed, tower, masks

    @contextmanager
    def of(self, step: int, chunk: int, keys: Keys) -> Iterator[None]:
        """During the block dropout belongs to these rows of this step, also in the parts of a
        forward pass that a backward pass computes once more."""
        torch.manual_seed(derived_seed(self._seed, step, chunk, self._tower))
        if self._masks:
            self._masks.use((self._seed, step, self._tower), keys)
        yield


def row_masks(tower: nn.Module, p: float, device: torch.device) -> RowMasks | None:
    """Replace the adapters' dropouts in a tower; None: there are none, or torch draws."""
    masks = RowMasks(p)
    layers: list[Any] = [layer for layer in tower.modules() if hasattr(layer, "lora_dropout")]
    if device.type != "cpu" or not p or not layers:
        return None
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = RowDropout(layer.in_features, masks)
    return masks
