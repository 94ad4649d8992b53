"""The order of the pairs: a function of (seed, epoch) and the number of pairs alone.

Workers, processes and micro-batches take their share of this order, they never shape it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that is a function of ``parts`` alone, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: this many epochs and then this many optimizer steps are done."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """How the pairs of an epoch fall into optimizer steps and micro-batches."""

    pairs: int
    effective: int
    micro: int
    seed: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last-plus-one place of each step in the epoch's order.

        The last step takes what is left. A single left-over pair joins the step before:
        alone it has no negatives, and its loss is 0 whatever the model.
        """
        starts = list(range(0, self.pairs, self.effective))
        if len(starts) > 1 and self.pairs - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.pairs], strict=True))

    @property
    def steps(self) -> int:
        return len(self.bounds)

    def micro_batches(self, step: int) -> int:
        first, last = self.bounds[step]
        return -(-(last - first) // self.micro)

    def order(self, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The permutation of one epoch, int64 [pairs]."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs)

    def from_position(self, start: Position, epochs: int) -> Iterator[list[tuple[int, int]]]:
        """The micro-batches from ``start`` to the end, as lists of (epoch, pair number)."""
        for epoch in range(start.epoch, epochs):
            order, bounds = self.order(epoch), self.bounds
            first_step = start.step if epoch == start.epoch else 0
            for first, last in bounds[first_step:]:
                for at in range(first, last, self.micro):
                    yield [(epoch, int(n)) for n in order[at : min(at + self.micro, last)]]
