"""What the loader yields: micro-batches, and the micro-batches of an optimizer step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipft.data.skipped import Skipped


@dataclass(frozen=True)
class Batch:
    """``pixel_values`` uint8 [B, 3, S, S], ``input_ids`` int64 [B, T] and pair numbers [B].

    ``augment`` still has to apply ``shifts``, int64 [B, 3], to the pixels, unless it is None.
    """

    pixel_values: Tensor
    input_ids: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...] = ()
    shifts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, rows: slice) -> "Batch":
        """Return these rows as a batch, without the list of skipped pairs."""
        shifts = None if self.shifts is None else self.shifts[rows]
        pixels, ids = self.pixel_values[rows], self.input_ids[rows]
        return Batch(pixels, ids, self.numbers[rows], (), shifts)


EMPTY_BATCH = Batch(torch.empty(0), torch.empty(0, 1, dtype=torch.int64), ())
"""The batch of a process that has no pairs where others have some."""


@dataclass(frozen=True)
class StepBatch:
    """The pairs of optimizer step ``step`` of ``epoch``, both counted from 0.

    ``micro_batches`` holds those of this process; ``pairs`` and ``skipped`` may be sums over
    several processes. ``general`` holds this process's micro-batches of the general set, if the
    run has one.
    """

    epoch: int
    step: int
    micro_batches: list[Batch]
    skipped: list[Skipped]
    pairs: int
    general: list[Batch] = field(default_factory=list)

    def free_images(self) -> None:
        """Drop the batches, before the next ones are read."""
        self.micro_batches.clear()
        self.general.clear()
