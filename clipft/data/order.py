"""The order of the pairs. It depends only on the seed, the epoch and the number of pairs, and on
their products and look-alikes if a run uses them.

The number of workers and processes and the size of micro-batches do not change the order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np

Place = TypeVar("Place")

Integers = np.ndarray[Any, np.dtype[np.int64]]


def derived_seed(*parts: int) -> int:
    """Mix ``parts`` to a 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class Position:
    """The progress of a run: complete epochs, and optimizer steps in the epoch after them."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Share:
    """The share of the process ``rank`` among ``world_size`` processes: consecutive items, so that
    the shares of all processes in the order of their ranks are the whole sequence."""

    rank: int = 0
    world_size: int = 1

    def of(self, things: int) -> range:
        first, last = (things * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(first, last)


SOLE_PROCESS = Share()


@dataclass(frozen=True)
class EpochPlan:
    """How the pairs of an epoch are divided into optimizer steps and micro-batches.

    A step has at least ``smallest`` pairs; 0 means a quarter of ``effective``. With ``products``,
    int64 [pairs], a step that has a photo of a product also has another photo of it, if there is
    one and the size of the step allows it. With ``look_alikes``, int64 [pairs, any], in the format
    of ``with_look_alikes``, a step has pairs with up to about ``hard_negatives`` look-alikes each.
    """

    pairs: int
    effective: int
    micro: int
    seed: int
    smallest: int = 0
    products: Integers | None = field(default=None, compare=False, repr=False)
    look_alikes: Integers | None = field(default=None, compare=False, repr=False)
    hard_negatives: int = 0

    @property
    def smallest_step(self) -> int:
        """The fewest pairs in a step, unless the whole epoch has fewer."""
        return self.smallest or max(2, -(-self.effective // 4))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last-plus-one place of each step in the order of the epoch.

        The last step has the remaining pairs. If they are fewer than ``smallest_step``, they join
        the step before: a step of few pairs has few negatives, so its gradient is mostly noise, but
        its learning rate would be that of a whole step.
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
        random = np.random.default_rng([self.seed, epoch])
        permuted = random.permutation(self.pairs)
        if self.products is None and self.look_alikes is None:
            return map(int, permuted[first:])
        blocks = [[number] for number in permuted.tolist()]
        if self.products is not None:
            blocks = photos_in_twos(permuted, self.products)
            blocks = [blocks[place] for place in random.permutation(len(blocks)).tolist()]
        if self.look_alikes is not None:
            blocks = with_look_alikes(blocks, self.look_alikes, self.hard_negatives)
            blocks = [blocks[place] for place in random.permutation(len(blocks)).tolist()]
        return iter(laid_out(blocks, self.bounds)[first:])

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


Blocks = list[list[int]]
"""Groups of pairs, by number, that should be in the same step."""


def photos_in_twos(permuted: Integers, products: Integers) -> Blocks:
    """Group the photos of each product in twos, in their order in ``permuted``.

    If their number is odd, the last three form one block. A single photo is a block of its own.

    Args:
        permuted: int64 [pairs], the numbers of the pairs in random order.
        products: int64 [pairs], equal for photos of one product, by the number of the pair.
    """
    grouped = permuted[np.argsort(products[permuted], kind="stable")]
    begins, sizes = np.unique(products[grouped], return_index=True, return_counts=True)[1:]
    nth, of = np.arange(len(grouped)) - np.repeat(begins, sizes), np.repeat(sizes, sizes)
    starts = np.flatnonzero((nth % 2 == 0) & ((nth < of - 1) | (of == 1)))
    ends, numbers = [*starts[1:].tolist(), len(grouped)], grouped.tolist()
    return [numbers[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]


def with_look_alikes(blocks: Blocks, look_alikes: Integers, most: int) -> Blocks:
    """Join each block with the blocks of its first pair's look-alikes, the nearest first.

    Blocks that are joined already are passed over.

    Args:
        blocks: blocks that contain each pair once.
        look_alikes: int64 [pairs, any], the look-alikes of a pair, the nearest first; -1 for none.
        most: no further block is added once this many pairs were added.
    """
    block_of = {number: place for place, block in enumerate(blocks) for number in block}
    joined, used = list[list[int]](), bytearray(len(blocks))
    for place, block in enumerate(blocks):
        if used[place]:
            continue
        used[place] = True
        found = list(block)
        wanted = len(found) + most
        for near in look_alikes[block[0]].tolist():
            if len(found) >= wanted:
                break
            if near >= 0 and not used[block_of[near]]:
                used[block_of[near]] = True
                found += blocks[block_of[near]]
        joined.append(found)
    return joined


def laid_out(blocks: Blocks, bounds: Iterable[tuple[int, int]]) -> list[int]:
    """Fill the steps with blocks, in their order.

    A block that does not fit into the rest of a step waits for the next step. It is split only if
    no other block fits either.

    Args:
        blocks: blocks that together have as many pairs as all steps.
        bounds: first and last-plus-one place of each step.
    """
    waiting: dict[int, deque[tuple[int, list[int]]]] = {}
    for place, block in enumerate(blocks):
        waiting.setdefault(len(block), deque()).append((place, block))
    laid = list[int]()
    for first, last in bounds:
        room = last - first
        while room:
            lengths = [length for length, queue in waiting.items() if queue]
            fitting = [length for length in lengths if length <= room] or lengths
            length = min(fitting, key=lambda length: waiting[length][0][0])
            place, block = waiting[length].popleft()
            laid += block[:room]
            if rest := block[room:]:
                waiting.setdefault(len(rest), deque()).appendleft((place, rest))
            room -= len(block) - len(rest)
    return laid
