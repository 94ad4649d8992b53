"""Describes images that keep their shape: the number of their patches, and how they are stored."""

import math
from dataclasses import dataclass
from typing import Any

_SMALLEST, _LARGEST, _STEP = 1e-6, 100.0, 1e-5


@dataclass(frozen=True)
class Patches:
    """The patches of one image: at most ``most``, each ``size`` x ``size`` pixels."""

    size: int
    most: int

    @property
    def side(self) -> int:
        """The side of a square with as many pixels, rounded down."""
        return math.isqrt(self.most * self.size**2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the strip that holds an image: [3, size, (1 + most) * size], uint8.

        The first patch of a strip is not part of the image. It contains the size of the grid of the
        other patches, which follow row by row. The number of rows is in the upper left pixel, and
        the number of columns in the pixel to its right, both in 16 bits: the high byte in the first
        channel, the low byte in the second.
        """
        return 3, self.size, (1 + self.most) * self.size

    def write_grid(self, strips: Any, rows: int, columns: int) -> None:
        """Write the size of a grid into one strip or several: uint8 [..., *shape]."""
        for corner, count in enumerate((rows, columns)):
            strips[..., 0, 0, corner], strips[..., 1, 0, corner] = divmod(count, 256)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of patches that an image of this size is resized to.

        The scale is the greatest with at most ``most`` patches. It is found by bisection with the
        same steps as in ``Siglip2ImageProcessor``, because the result depends on them.
        """

        def at(scale: float) -> tuple[int, int]:
            rows, columns = (
                max(1, math.ceil(side * scale / self.size)) for side in (height, width)
            )
            return rows, columns

        low, high = _SMALLEST, _LARGEST
        while high - low >= _STEP:
            middle = (low + high) / 2
            if math.prod(at(middle)) <= self.most:
                low = middle
            else:
                high = middle
        return at(low)
