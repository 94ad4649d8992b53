"""The order of the pairs: a function of (seed, epoch) and the number of pairs alone.

Workers, processes and micro-batches take their share of this order; they never shape it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np

Place = TypeVar("Place")


def derived_seed(*parts: int) -> int:
    """Mix ``parts`` to a 63-bit seed that depends on nothing else."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class Position:
    """How far a run has come: so many epochs are done, and then so many optimizer steps."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Share:
    """The share of the process ``rank`` among ``world_size``: neighbors in a row, such that the
    shares of all processes one after another are the whole row."""

    rank: int = 0
    world_size: int = 1

    def of(self, things: int) -> range:
        first, last = (things * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(first, last)


SOLE_PROCESS = Share()


@dataclass(frozen=True)
class EpochPlan:
    """How the pairs of an epoch fall into optimizer steps and micro-batches.

    Fewer pairs than ``smallest`` are no step of their own; 0 stands for a quarter of ``effective``.
    """

    pairs: int
    effective: int
    micro: int
    seed: int
    smallest: int = 0

    @property
    def smallest_step(self) -> int:
        """The fewest pairs that are a step of their own, unless the whole epoch has fewer."""
        return self.smallest or max(2, -(-self.effective // 4))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last-plus-one place of each step in the order of the epoch.

        The last step takes what is left. If that is less than ``smallest_step``, it joins the step
        before: a step of few pairs has few negatives, so its gradient is mostly noise, and yet the
        learning rate would be that of a whole step.
        """
        starts = list(range(0, self.pairs, self.effective))
        if len(starts) > 1 and self.pairs - starts[-1] < self.smallest_step:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.pairs], strict=True))

    @property
    def steps(self) -> int:
        return len(self.bounds)

    def micro_batches(self, step: int) -> int:
        first, last = self.bounds[step]
        return -(-(last - first) // self.micro)

    def order(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Iterate over the permutation of one epoch, from its ``first``-th pair on."""
        permuted = np.random.default_rng([self.seed, epoch]).permutation(self.pairs)
        return map(int, permuted[first:])

    def from_position(
        self,
        start: Position,
        epochs: int,
        order: Callable[[int, int], Iterator[Place]],
        share: Share = SOLE_PROCESS,
    ) -> Iterator[list[tuple[int, Place]]]:
        """Yield the micro-batches in ``share`` of each step from ``start`` to the end of the run.

        A micro-batch is a list of (epoch, place). ``order`` maps (epoch, first) to the places of
        the epoch from the ``first``-th on.
        """
        for epoch in range(start.epoch, epochs):
            bounds = self.bounds[start.step if epoch == start.epoch else 0 :]
            places = order(epoch, bounds[0][0])
            for first, last in bounds:
                starts = range(first, last, self.micro)
                mine = share.of(len(starts))
                for micro, at in enumerate(starts):
                    taken = islice(places, min(self.micro, last - at))
                    if micro in mine:
                        yield [(epoch, place) for place in taken]
                    else:
                        deque(taken, maxlen=0)  # skips the places of another process
