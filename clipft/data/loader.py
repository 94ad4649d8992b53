"""Turns shards into batches with worker processes. The order and the augmentations are the same for
any number of workers.

A worker decodes at most ``CHUNK`` pairs at a time, into memory that it shares with the main
process, which joins them to micro-batches. Images are uint8; the model normalizes them. A pair that
cannot be used is skipped: its batch is smaller by one and lists the pair with the reason (see
``skipped``), and the order of all other pairs does not change.
"""

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipft.config.sections.data import DataSettings
from clipft.data.batch import EMPTY_BATCH, Batch, StepBatch
from clipft.data.captions.tokenizer import padded
from clipft.data.decoding import (
    ChunkDecoder,
    DecodedChunk,
    DecodingTask,
    PairSource,
    Places,
    Preprocessing,
)
from clipft.data.order import SOLE_PROCESS, EpochPlan, Position, Share
from clipft.data.shards.dataset import PairDataset
from clipft.data.workers import (
    SharedPixels,
    UnderWay,
    end_workers,
    ignore_signals,
    kill_workers,
    next_batch,
    started,
)

if TYPE_CHECKING:
    from clipft.data.shards.stream import PairStream  # webdataset is slow to import

CHUNK = 64
"""The most pairs that a worker decodes at a time."""
AHEAD_BYTES = 1 << 30
"""The most bytes of decoded images that workers hold ready, beyond two chunks each."""


Pairs: TypeAlias = "PairDataset | PairStream"
"""What a run can train on."""


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the loader: how batches are made, and this process's share of them.

    With 0 ``workers``, the main process decodes. A worker that gives no batch for ``timeout``
    seconds is considered hung; 0 means never. ``leave_shift`` leaves the part of the augmentation
    that the device can do to the device (see ``augment``).
    """

    workers: int = 0
    pin_memory: bool = False
    share: Share = SOLE_PROCESS
    timeout: float = 0
    leave_shift: bool = False

    @classmethod
    def from_settings(
        cls,
        settings: DataSettings,
        device: torch.device,
        share: Share = SOLE_PROCESS,
        local_world_size: int = 1,
    ) -> "LoaderOptions":
        """Take the options from the settings; the processes of one machine share its processors."""
        workers = settings.workers(local_world_size)
        on_cuda, where = device.type == "cuda", settings.augment_on
        # Not measured on a GPU yet. The shift takes 4 to 9% of the time to resize and augment
        leave_shift = where == "device" or (where == "auto" and on_cuda)
        return cls(workers, on_cuda, share, settings.worker_timeout, leave_shift)


def training_batches(
    dataset: Pairs,
    preprocessing: Preprocessing,
    plan: EpochPlan,
    start: Position,
    epochs: int,
    options: LoaderOptions,
) -> Iterator[StepBatch]:
    """Yield the steps from ``start`` to the end of the last epoch, each with the micro-batches in
    ``options.share``.

    Raises:
        DataError: A shard was changed, or a worker died or hung.
    """
    if start.epoch >= epochs:
        return
    share = options.share
    micro_batches = plan.from_position(start, epochs, dataset.order(plan), share)
    ahead = prefetch_factor(plan, preprocessing.image_size, options)
    batches = _batches(dataset, preprocessing, micro_batches, plan.micro, ahead, options)
    for epoch in range(start.epoch, epochs):
        for step in range(start.step if epoch == start.epoch else 0, plan.steps):
            count = len(share.of(plan.micro_batches(step)))
            read = [next(batches) for _ in range(count)]
            skipped = [pair for batch in read for pair in batch.skipped]
            with_pairs = [batch for batch in read if len(batch)]
            pairs = sum(map(len, read))
            # The trainer empties ``with_pairs`` when a step is done. A second list of the same
            # batches would keep their images in memory while the next step is read.
            del read
            yield StepBatch(epoch, step, with_pairs, skipped, pairs)


def one_ahead(
    batches: Iterator[StepBatch], start: Callable[[StepBatch], None]
) -> Iterator[StepBatch]:
    """Yield each batch after the next one was read and ``start`` was called with it.

    If reading the next batch fails, the error is raised after the current batch was used.
    """
    following: StepBatch | None
    following, failed = next(batches, None), None
    while following:
        batch = following
        try:
            if following := next(batches, None):
                start(following)
        except Exception as error:
            following, failed = None, error
        yield batch
    if failed:
        raise failed


def prefetch_factor(plan: EpochPlan, image_size: int, options: LoaderOptions) -> int:
    """Choose how many chunks each worker reads ahead.

    Together the workers hold a whole step, so that the next step is ready when this one is done,
    and one more chunk. They hold less if that would take more than ``AHEAD_BYTES``.
    """
    chunk, workers = min(CHUNK, plan.micro), max(1, options.workers)
    step = -(-plan.effective // (chunk * options.share.world_size))
    room = AHEAD_BYTES // (chunk * 3 * image_size**2)
    return max(2, min(-(-step // workers) + 1, room // workers))


def shared_bytes(plan: EpochPlan, image_size: int, options: LoaderOptions) -> int:
    """Return the size in bytes of the memory that workers share with the main process."""
    slots = _slots(options.workers, prefetch_factor(plan, image_size, options))
    return slots * min(CHUNK, plan.micro) * 3 * image_size**2


def _slots(workers: int, ahead: int) -> int:
    """Return how many chunks exist at a time: those in work or ready, and one to join."""
    return workers * ahead + 1


def evaluation_batches(
    dataset: PairSource, preprocessing: Preprocessing, batch_size: int, options: LoaderOptions
) -> Iterator[Batch]:
    """Yield the batches in ``options.share`` of all pairs, in the order of the data set.

    Empty batches are added so that all processes have the same number.

    Raises:
        DataError: A shard was changed, or a worker died or hung.
    """
    numbers, share = range(len(dataset)), options.share
    starts = numbers[::batch_size]
    mine = [starts[i] for i in share.of(len(starts))]
    in_order = ([(0, n) for n in numbers[i : i + batch_size]] for i in mine)
    plan = EpochPlan(len(numbers), batch_size * share.world_size, batch_size, 0)
    ahead = prefetch_factor(plan, preprocessing.image_size, options)
    yield from _batches(dataset, preprocessing, in_order, batch_size, ahead, options)
    for _ in range(-(-len(starts) // share.world_size) - len(mine)):
        yield EMPTY_BATCH


def chosen_batches(
    dataset: PairSource,
    preprocessing: Preprocessing,
    numbers: Iterable[int],
    batch_size: int,
    options: LoaderOptions,
) -> Iterator[Batch]:
    """Yield the batches of the pairs with these numbers. ``numbers`` may be computed lazily: each
    is requested only when a worker is free to read the pair.

    Raises:
        DataError: A shard was changed, or a worker died or hung.
    """
    places = ((0, number) for number in numbers)
    micro_batches = iter(lambda: list(islice(places, batch_size)), [])
    plan = EpochPlan(len(dataset), batch_size, batch_size, 0)
    ahead = prefetch_factor(plan, preprocessing.image_size, options)
    return _batches(dataset, preprocessing, micro_batches, batch_size, ahead, options)


def _batches(
    dataset: PairSource,
    preprocessing: Preprocessing,
    micro_batches: Iterable[Places],
    most: int,
    ahead: int,
    options: LoaderOptions,
) -> Iterator[Batch]:
    """Yield the micro-batches, which have at most ``most`` pairs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers run in parallel already
    workers = options.workers
    if not preprocessing.read_images:
        workers = 0  # looking captions up takes less time than sending them
        assert isinstance(dataset, PairDataset), "pairs of a stream have no number to look up"
    shared = SharedPixels((_slots(workers, ahead), min(CHUNK, most), *preprocessing.pixels_shape))
    free, under_way = deque(range(len(shared.slots))), UnderWay(workers)
    if workers:
        atexit.unregister(kill_workers)  # once is enough
        atexit.register(kill_workers)
    chunks = DataLoader(
        ChunkDecoder(dataset, preprocessing, shared, under_way, options.leave_shift),
        batch_size=None,
        sampler=_tasks(micro_batches, free),
        collate_fn=_unchanged,
        worker_init_fn=ignore_signals,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        timeout=options.timeout if workers else 0,
        # Otherwise iter() draws a seed from the global generator, and the model's random numbers
        # would depend on how many loaders were made
        generator=torch.Generator(),
    )
    reader = started(iter(chunks))
    pad_token_id = preprocessing.captions.pad_token_id
    join = _Join(shared.slots, free, most, pad_token_id, options.pin_memory)
    try:
        while True:
            try:
                chunk: DecodedChunk = next_batch(reader, under_way)
            except StopIteration:
                return
            join.add(chunk)
            if chunk.ends:
                yield join.batch()
    finally:
        end_workers(reader)


def _tasks(micro_batches: Iterable[Places], free: deque[int]) -> Iterator[DecodingTask]:
    """Cut micro-batches into tasks, each with the next of the ``free`` slots.

    A DataLoader requests the next task before it returns a chunk, so there is one more slot than
    chunks that are ready or being decoded.
    """
    for places in micro_batches:
        for first in range(0, len(places), CHUNK):
            last = first + CHUNK
            yield DecodingTask(free.popleft(), places[first:last], last >= len(places))


def _unchanged(chunk: Any) -> Any:
    return chunk


class _Join:
    """Joins chunks to micro-batches, in memory that is reused once nothing refers to it."""

    def __init__(
        self, slots: Tensor, free: deque[int], most: int, pad_token_id: int, pin_memory: bool
    ) -> None:
        self.slots, self.free = slots, free
        self.pad_token_id, self.pin_memory = pad_token_id, pin_memory
        self.shape = (most, *slots.shape[2:])
        self.unused, self.chunks = list[Any](), list[DecodedChunk]()
        self.pixels: Tensor | None = None

    def add(self, chunk: DecodedChunk) -> None:
        """Copy the pixels of a chunk and free its slot."""
        if self.pixels is None:
            self.pixels = self._memory()
        first, count = sum(len(c.numbers) for c in self.chunks), len(chunk.numbers)
        self.pixels[first : first + count] = self.slots[chunk.slot, :count]
        self.free.append(chunk.slot)
        self.chunks.append(chunk)

    def batch(self) -> Batch:
        """Return the chunks added since the last call as a micro-batch."""
        chunks, memory = self.chunks, self.pixels
        self.chunks, self.pixels = [], None
        numbers = tuple(number for chunk in chunks for number in chunk.numbers)
        skipped = tuple(pair for chunk in chunks for pair in chunk.skipped)
        if not numbers or memory is None:
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), skipped)
        ids = padded([ids for chunk in chunks for ids in chunk.ids], self.pad_token_id)
        shifts = [shift for chunk in chunks for shift in chunk.shifts]
        left = torch.tensor(shifts) if shifts else None
        if self.pin_memory:
            ids, left = ids.pin_memory(), None if left is None else left.pin_memory()
        return Batch(memory[: len(numbers)], ids, numbers, skipped, left)

    def _memory(self) -> Tensor:
        if self.pin_memory:  # torch keeps pinned memory, and waits for the copies to the device
            return torch.empty(self.shape, dtype=torch.uint8, pin_memory=True)
        # Allocating new memory takes longer than the copy
        memory = self.unused.pop() if self.unused else np.empty(self.shape, np.uint8)
        lent = memory.view()  # a tensor, and all that is cut from it, keep this object alive
        weakref.finalize(lent, self.unused.append, memory).atexit = False
        return torch.from_numpy(lent)
