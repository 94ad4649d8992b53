"""Dropout whose masks depend on the row, and not on the device or on how the rows are batched.

A hash of (seed, step, tower, key of the row, dropout, position, column) decides whether a value is
dropped. It is computed with integer operations on tensors. A row has the same mask in every
chunk, process and pass, so a second forward pass draws the masks of the first, and no random state
has to be saved or restored.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clipft.core.hashing import INCREMENT, Words, mix64

_LEVELS = 1 << 16
"""Masks are drawn with 16 bits per value: two values from each 32-bit word."""
_MOST_POSITIONS = 1 << 16
"""Positions of a row that get different masks. No tower has this many."""
_COLUMN_BITS = 12
"""Bits that number the 32-bit words of a row, so that one table serves all widths up to 8,192."""


class RowMasks:
    """The masks of all dropouts in one tower, for the current rows.

    ``p`` is the share of values that is dropped. The other values must be multiplied by ``scale``.
    """

    def __init__(self, p: float, device: torch.device | str = "cpu") -> None:
        dropped = round(p * _LEVELS)
        self.scale = 1 / (1 - dropped / _LEVELS)
        self._device = torch.device(device)
        self._first_kept = dropped - _LEVELS // 2  # compared with signed 16-bit integers
        self._dropouts = 0
        self._columns = torch.empty(0, dtype=torch.int32)
        self._keys = self._factors = torch.empty(0, dtype=torch.int32)

    def reserve(self, width: int) -> int:
        """Add one more dropout over ``width`` values; return its number."""
        words = -(-width // 2)
        if words > len(self._columns):
            self._columns = _column_words(words).to(self._device)
        self._dropouts += 1
        return self._dropouts - 1

    def use(self, seed: Sequence[int], keys: Words, positions: int) -> None:
        """Set the current rows by their keys, uint64 [rows]. A row has up to ``positions``."""
        hashed = keys.astype(np.uint64)
        for word in seed:
            state = hashed ^ mix64(np.full(1, word, np.uint64) + INCREMENT)
            hashed = mix64(state + INCREMENT)
        words = torch.from_numpy(hashed.view(np.int32).reshape(-1, 2).copy())
        first, second = words.to(self._device, non_blocking=True).T[..., None]
        # One word for each dropout, row and position: [dropouts, rows, positions]
        dropouts = torch.arange(self._dropouts, device=self._device, dtype=torch.int32)
        places = torch.arange(positions, device=self._device, dtype=torch.int32)
        places = dropouts[:, None, None] * _MOST_POSITIONS + places
        self._keys = _mix32(first + places * -0x61C88647)  # the golden ratio, as in splitmix
        self._factors = _mix32(self._keys ^ second) | 1

    def kept(self, dropout: int, positions: int, width: int) -> Tensor:
        """Return which values of the current rows are kept: bool [rows, positions, width].

        The decision is a multiply-shift hash (Dietzfelbinger et al. 1997) of the column. Each row
        and position has its own key and odd factor. Two operations on a word serve two values.
        """
        keys, factors = self._keys[dropout, :, :positions], self._factors[dropout, :, :positions]
        drawn = (self._columns[: -(-width // 2)] ^ keys[..., None]).mul_(factors[..., None])
        return drawn.view(torch.int16)[..., :width] >= self._first_kept


class RowDropout(nn.Module):
    """Replaces ``nn.Dropout`` before an adapter. Its input is [rows, positions, width]."""

    def __init__(self, width: int, masks: RowMasks) -> None:
        super().__init__()
        self.masks, self._width = masks, width
        self._number = masks.reserve(width)

    def zero(self, values: Tensor) -> Tensor:
        """Set dropped values to 0. The caller must multiply the others by ``masks.scale``."""
        return torch.where(self.masks.kept(self._number, values.shape[1], self._width), values, 0)

    def forward(self, values: Tensor) -> Tensor:
        return self.zero(values) * self.masks.scale if self.training else values


def _column_words(count: int) -> Tensor:
    """Return a constant for each pair of columns, int32 [count].

    The low bits are a permutation. If two constants differed only in their highest bits, so would
    their products, and their columns would be dropped together.
    """
    bits = max(_COLUMN_BITS, (count - 1).bit_length())
    source = np.random.Generator(np.random.SFC64(bits))
    low = source.permutation(1 << bits).astype(np.uint32)
    high = source.integers(1 << (32 - bits), size=1 << bits, dtype=np.uint32) << np.uint32(bits)
    return torch.from_numpy((high | low)[:count].view(np.int32).copy())


def _mix32(words: Tensor) -> Tensor:
    """Apply the finalizer of MurmurHash3 to an int32 tensor."""
    words = (words ^ _shifted(words, 16)) * -0x7A143595
    words = (words ^ _shifted(words, 13)) * -0x3D4D51CB
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically, so the copies of the sign must be cleared
    return (words >> bits) & ((1 << (32 - bits)) - 1)
