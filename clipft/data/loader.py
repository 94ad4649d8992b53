"""Shards -> batches, with worker processes, in an order and with augmentations that are
the same for any number of them.

uint8 pictures leave the workers; normalising is the model's business. A pair that cannot
be decoded is left out of its batch and named in it: positions stay where they are.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipft.config.settings import DataSettings
from clipft.core.common import processors
from clipft.core.errors import DataError
from clipft.data.augmentation import make_transform
from clipft.data.captions.table import CaptionSource
from clipft.data.captions.template import BadCaption
from clipft.data.captions.tokenizer import padded
from clipft.data.images import BadImage, decode_image
from clipft.data.order import SOLE_PROCESS, EpochPlan, Position, Share, derived_seed
from clipft.data.shards.dataset import PairDataset, RawPair
from clipft.data.skipped import Skipped
from clipft.data.workers import (
    UnderWay,
    ignore_signals,
    kill_workers_at_exit,
    next_batch,
    started,
)

AHEAD_BYTES = 1 << 30
"""Of decoded pictures that workers hold ready at most, beyond two micro-batches each."""


@dataclass(frozen=True)
class Batch:
    """``pixel_values`` uint8 [B, 3, S, S]; ``input_ids`` int64 [B, T]; pair numbers [B]."""

    pixel_values: Tensor
    input_ids: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device) -> "Batch":
        pixels = self.pixel_values.to(device, non_blocking=True)
        ids = self.input_ids.to(device, non_blocking=True)
        return Batch(pixels, ids, self.numbers, self.skipped)

    def pin_memory(self) -> "Batch":
        pixels, ids = self.pixel_values.pin_memory(), self.input_ids.pin_memory()
        return Batch(pixels, ids, self.numbers, self.skipped)


EMPTY_BATCH = Batch(torch.empty(0), torch.empty(0, 1, dtype=torch.int64), ())
"""What a process has that has nothing."""


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: step ``step`` of ``epoch``, from 0. ``micro_batches`` are this
    process's, ``pairs`` and ``skipped`` those of as many processes as are known."""

    epoch: int
    step: int
    micro_batches: list[Batch]
    skipped: list[Skipped]
    pairs: int

    @classmethod
    def of(cls, epoch: int, step: int, read: Sequence[Batch]) -> "StepBatch":
        """Of the micro-batches as they were ``read``, those that have pairs."""
        skipped = [skipped for batch in read for skipped in batch.skipped]
        return cls(epoch, step, [b for b in read if len(b)], skipped, sum(map(len, read)))


@dataclass(frozen=True)
class Preprocessing:
    """How raw bytes become model input.

    ``read_images`` False: none is read, because the vision tower's features are there already;
    ``bad`` are then the pairs, by number, whose pictures cannot be used, and why.
    """

    captions: CaptionSource
    image_size: int
    augmentation: str
    seed: int
    squashed: bool = False
    read_images: bool = True
    bad: Mapping[int, str] = field(default_factory=dict)


class PairSource(Protocol):
    """What a worker reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any, /) -> RawPair:
        """In a worker: the pair at a place: a number, or what ``Pairs.order`` gave.

        Raises:
            DataError: what it lies in was changed or removed.
        """


class Pairs(PairSource, Protocol):
    """What can be trained on: an indexed ``PairDataset`` or a ``PairStream``."""

    @property
    def skipped(self) -> Sequence[Skipped]: ...

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[Any]]:
        """(epoch, first) -> the places of an epoch from the ``first``-th on."""

    def identity(self) -> str:
        """Equal for equal data in an equal order, whatever the folder."""


@dataclass(frozen=True)
class LoaderOptions:
    """How batches travel, and which. ``workers`` 0: decoded by the main process. ``timeout`` in
    seconds: without a batch for so long, a worker is taken for hung; 0: never."""

    workers: int = 0
    pin_memory: bool = False
    share: Share = SOLE_PROCESS
    timeout: float = 0

    @classmethod
    def from_settings(
        cls,
        settings: DataSettings,
        device: torch.device,
        share: Share = SOLE_PROCESS,
        beside: int = 1,
    ) -> "LoaderOptions":
        """As the settings have it, where ``beside`` processes each take their part of the
        machine's processors."""
        workers = min(settings.num_workers, max(1, processors() // beside))
        return cls(workers, device.type == "cuda", share, settings.worker_timeout)

    @property
    def processes(self) -> int:
        """Of the workers asked for, as many as there are processors."""
        return min(self.workers, processors())


def training_batches(
    dataset: Pairs,
    preprocessing: Preprocessing,
    plan: EpochPlan,
    start: Position,
    epochs: int,
    options: LoaderOptions,
) -> Iterator[StepBatch]:
    """The steps from ``start`` to the end of the last epoch, of each what is in
    ``options.share``."""
    if start.epoch >= epochs:
        return
    share = options.share
    micro_batches = plan.from_position(start, epochs, dataset.order(plan), share)
    ahead = _ahead(plan, preprocessing.image_size, options)
    under_way = UnderWay(options.processes)
    loader = _loader(dataset, preprocessing, micro_batches, options, under_way, ahead)
    batches = started(iter(loader))
    for epoch in range(start.epoch, epochs):
        for step in range(start.step if epoch == start.epoch else 0, plan.steps):
            numbers = share.of(plan.micro_batches(step))
            yield StepBatch.of(epoch, step, [_next(batches, under_way) for _ in numbers])


def _ahead(plan: EpochPlan, image_size: int, options: LoaderOptions) -> int:
    """Micro-batches that each worker has ready: together a whole step, so that the next one is
    there when this one is done, and one more; less where that would take too much memory."""
    step = -(-plan.effective // (plan.micro * options.share.count))
    room = AHEAD_BYTES // (plan.micro * 3 * image_size**2)
    workers = max(1, options.processes)
    return max(2, min(-(-step // workers) + 1, room // workers))


def evaluation_batches(
    dataset: PairSource, preprocessing: Preprocessing, batch_size: int, options: LoaderOptions
) -> Iterator[Batch]:
    """All pairs once, in their own order; of its batches those in ``options.share``, filled up
    with empty ones: each share has as many."""
    numbers, share = range(len(dataset)), options.share
    starts = numbers[::batch_size]
    mine = [starts[i] for i in share.of(len(starts))]
    chunks = ([(0, n) for n in numbers[i : i + batch_size]] for i in mine)
    under_way = UnderWay(options.processes)
    batches = started(iter(_loader(dataset, preprocessing, chunks, options, under_way)))
    for _ in mine:
        yield _next(batches, under_way)
    for _ in range(-(-len(starts) // share.count) - len(mine)):
        yield EMPTY_BATCH


def _loader(
    dataset: PairSource,
    preprocessing: Preprocessing,
    micro_batches: Iterable[list[tuple[int, Any]]],
    options: LoaderOptions,
    under_way: UnderWay,
    ahead: int = 2,
) -> "DataLoader[Batch | DataError]":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are the parallelism
    # Looking captions up takes less time than sending them between processes
    workers = options.processes if preprocessing.read_images else 0
    if workers:
        kill_workers_at_exit()
    decoded: Any = (  # items become a Batch in collate
        _Decoded(dataset, preprocessing, under_way)
        if preprocessing.read_images
        else _Captioned(dataset, preprocessing)
    )
    return DataLoader(
        decoded,
        batch_sampler=micro_batches,
        collate_fn=_Collate(preprocessing.captions.pad_token_id),
        worker_init_fn=ignore_signals,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=options.pin_memory,
        timeout=options.timeout if workers else 0,
        # Otherwise iter() draws a seed from the global generator, and dropout would follow
        generator=torch.Generator(),
    )


def _next(batches: "Iterator[Batch | DataError]", under_way: UnderWay) -> Batch:
    batch: Batch | DataError = next_batch(batches, under_way)
    if isinstance(batch, DataError):
        raise batch
    return batch


@dataclass(frozen=True)
class _Pair:
    number: int
    pixels: Tensor
    ids: list[int]


class _Decoded(Dataset["_Pair | Skipped | DataError"]):
    """(epoch, place) -> a decoded pair; augmentation depends on (seed, epoch, number).

    A ``DataError`` is handed on rather than raised: from a worker torch would bring its text
    alone.
    """

    def __init__(
        self, dataset: PairSource, preprocessing: Preprocessing, under_way: UnderWay
    ) -> None:
        self.dataset, self.under_way = dataset, under_way
        self.seed, self.captions = preprocessing.seed, preprocessing.captions
        self.transform = make_transform(
            preprocessing.augmentation, preprocessing.image_size, preprocessing.squashed
        )
        # Evaluation decodes in full, as the model's own processor would
        random = preprocessing.augmentation != "none"
        self.at_least = preprocessing.image_size if random else 0

    def __getitem__(self, place: tuple[int, Any]) -> "_Pair | Skipped | DataError":
        epoch, which = place
        name = f"pair {which}" if isinstance(which, int) else "a pair"
        with self.under_way.at(name) as say:
            try:
                raw = self.dataset[which]
            except DataError as error:
                return error
            say(f"{raw.key} in {raw.shard}")
            return self._decoded(raw, epoch)

    def _decoded(self, raw: RawPair, epoch: int) -> "_Pair | Skipped":
        try:
            ids = self.captions.ids(raw, epoch)
            image = decode_image(raw.image, self.at_least)
            pixels = self.transform(image, derived_seed(self.seed, epoch, raw.number))
            return _Pair(raw.number, pixels, ids)
        except (BadImage, BadCaption) as error:
            return Skipped(raw.shard, raw.key, str(error))


class _Captioned(Dataset["_Pair | Skipped"]):
    """(epoch, number) -> the caption of a pair, and in the picture's place nothing."""

    _NOTHING = torch.empty(0, dtype=torch.uint8)

    def __init__(self, dataset: PairSource, preprocessing: Preprocessing) -> None:
        assert isinstance(dataset, PairDataset), "pairs of a stream have no number to look up"
        self.dataset, self.preprocessing = dataset, preprocessing

    def __getitem__(self, place: tuple[int, int]) -> "_Pair | Skipped":
        epoch, number = place
        named, bad = self.dataset.named(number), self.preprocessing.bad.get(number)
        if bad:
            return Skipped(named.shard, named.key, bad)
        try:
            return _Pair(number, self._NOTHING, self.preprocessing.captions.ids(named, epoch))
        except BadCaption as error:
            return Skipped(named.shard, named.key, str(error))


@dataclass(frozen=True)
class _Collate:
    pad_token_id: int

    def __call__(self, items: "list[_Pair | Skipped | DataError]") -> "Batch | DataError":
        for item in items:
            if isinstance(item, DataError):
                return item
        pairs = [item for item in items if isinstance(item, _Pair)]
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        if not pairs:
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), skipped)
        pixels = torch.stack([pair.pixels for pair in pairs])
        ids = padded([pair.ids for pair in pairs], self.pad_token_id)
        return Batch(pixels, ids, tuple(pair.number for pair in pairs), skipped)
