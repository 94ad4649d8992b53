"""Dropout whose masks belong to the rows, not to the batches.

The mask of a row is a function of (seed, step, tower, key of the row). It is the same in
whichever micro-batch, chunk or process the row is, so a second pass draws the masks of the first,
and no random state has to be saved or restored. On a CPU the masks come from numpy's SFC64, row by
row, in about a fifth of the time of torch's generator. On other devices torch draws them, seeded
per chunk; there they belong to the chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipft.data.captions.tokenizer import Keys
from clipft.data.order import derived_seed

_LEVELS = 1 << 16
"""Masks are drawn with 16 bits per value."""


class RowMasks:
    """The masks of all dropouts in one tower, for the rows that are passing through it.

    ``p`` is the share of values that is dropped. Each dropout of the tower reserves a slice of
    the last dimension.
    """

    def __init__(self, p: float) -> None:
        self._limit = np.uint16(round(p * _LEVELS))
        self.scale = 1 / (1 - int(self._limit) / _LEVELS)
        self.width = 0
        self._seed: tuple[int, ...] = ()
        self._keys: Keys | None = None
        self._drawn: Tensor | None = None

    def reserve(self, width: int) -> slice:
        """Reserve masks for one more dropout over ``width`` values."""
        self.width += width
        return slice(self.width - width, self.width)

    def use(self, seed: tuple[int, ...], keys: Keys) -> None:
        """Continue with the rows that have these keys, uint64 [rows]."""
        self._seed, self._keys, self._drawn = seed, keys, None

    def kept(self, positions: int) -> Tensor:
        """Return which values of the current rows stay: bool [rows, positions, width]."""
        if self._drawn is None or positions > self._drawn.shape[1]:
            assert self._keys is not None, "rows without keys"
            values = positions * self.width
            kept = np.empty((len(self._keys), values), np.bool_)
            # Position by position, so that a longer row begins with the masks of a shorter one
            for row, key in zip(kept, self._keys.tolist(), strict=True):
                source = np.random.SFC64(np.random.SeedSequence((*self._seed, key)))
                drawn = np.asarray(source.random_raw(-(-values // 4))).view(np.uint16)
                np.greater_equal(drawn[:values], self._limit, out=row)
            self._drawn = torch.from_numpy(kept.reshape(len(kept), positions, self.width))
        return self._drawn[:, :positions]


class RowDropout(nn.Module):
    """Replaces ``nn.Dropout`` before an adapter, over [rows, positions, width]."""

    def __init__(self, width: int, masks: RowMasks) -> None:
        super().__init__()
        self._masks, self._slice = masks, masks.reserve(width)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        kept = self._masks.kept(values.shape[1])[..., self._slice]
        dropped: Tensor = _Dropped.apply(values, kept, self._masks.scale)
        return dropped


class _Dropped(torch.autograd.Function):
    """values * kept * scale with one new tensor each way: the cost is that of touching memory
    for the first time."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.where(kept, values, 0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradients[0], 0).mul_(ctx.scale), None, None


@dataclass(frozen=True)
class Randomness:
    """Everything random in a tower; ``tower`` is 0 for images and 1 for texts."""

    seed: int
    tower: int
    masks: RowMasks | None

    @contextmanager
    def seeded(self, step: int, chunk: int, keys: Keys) -> Iterator[None]:
        """Make dropout during the block a function of these rows of this step.

        That includes the parts of a forward pass that gradient checkpointing runs again.
        """
        torch.manual_seed(derived_seed(self.seed, step, chunk, self.tower))
        if self.masks:
            self.masks.use((self.seed, step, self.tower), keys)
        yield


def row_masks(tower: nn.Module, p: float, device: torch.device) -> RowMasks | None:
    """Replace the dropouts of a tower's adapters; None if there are none, or torch draws them."""
    layers: list[Any] = [layer for layer in tower.modules() if hasattr(layer, "lora_dropout")]
    if device.type != "cpu" or not p or not layers:
        return None
    masks = RowMasks(p)
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = RowDropout(layer.in_features, masks)
    return masks
