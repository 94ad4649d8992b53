"""Turns shards into batches with worker processes. The order and the augmentations are the same for
any number of workers.

Images leave the workers as uint8; normalizing them is the model's business. A pair that cannot be
used is skipped: its batch is smaller by one and lists it with the reason (see ``skipped``), and all
other pairs stay where they are in the order.
"""

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipft.config.settings import DataSettings
from clipft.core.common import processors
from clipft.core.errors import DataError
from clipft.data.augmentation import Transform, make_transform
from clipft.data.captions.table import CaptionSource
from clipft.data.captions.template import BadCaption
from clipft.data.captions.tokenizer import padded
from clipft.data.images import BadImage, decode_image
from clipft.data.order import SOLE_PROCESS, EpochPlan, Position, Share, derived_seed
from clipft.data.shards.dataset import PairDataset, RawPair
from clipft.data.skipped import Skipped
from clipft.data.workers import UnderWay, ignore_signals, kill_workers, next_batch, started

if TYPE_CHECKING:
    from clipft.data.shards.stream import PairStream  # webdataset takes its time to import

AHEAD_BYTES = 1 << 30
"""The most decoded images that workers hold ready, beyond two micro-batches each."""


class PairSource(Protocol):
    """Where a worker reads pairs from."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any, /) -> RawPair:
        """Read the pair at a place: a number, or what ``order`` gave.

        Raises:
            DataError: The file that it is in was changed or removed.
        """


Pairs: TypeAlias = "PairDataset | PairStream"
"""What a run can train on."""


@dataclass(frozen=True)
class Batch:
    """``pixel_values`` uint8 [B, 3, S, S], ``input_ids`` int64 [B, T] and pair numbers [B]."""

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
        """Called by the DataLoader, which cannot pin the tensors of a class it does not know."""
        pixels, ids = self.pixel_values.pin_memory(), self.input_ids.pin_memory()
        return Batch(pixels, ids, self.numbers, self.skipped)


EMPTY_BATCH = Batch(torch.empty(0), torch.empty(0, 1, dtype=torch.int64), ())
"""The batch of a process that has no pairs where others have some."""


@dataclass(frozen=True)
class StepBatch:
    """The pairs of optimizer step ``step`` of ``epoch``, both counted from 0.

    ``micro_batches`` are those of this process; ``pairs`` and ``skipped`` may be added up over
    several processes.
    """

    epoch: int
    step: int
    micro_batches: list[Batch]
    skipped: list[Skipped]
    pairs: int


@dataclass(frozen=True)
class Preprocessing:
    """How raw bytes become model input.

    If the features of the vision tower are known already, ``read_images`` is False and no image is
    read; ``bad`` then maps the numbers of pairs whose images cannot be used to the reason.
    """

    captions: CaptionSource
    image_size: int
    augmentation: str
    seed: int
    squashed: bool = False
    read_images: bool = True
    bad: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made, and which.

    With 0 ``workers``, the main process decodes. A worker that gives no batch for ``timeout``
    seconds is considered hung; 0 means never.
    """

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
        local_world_size: int = 1,
    ) -> "LoaderOptions":
        """Take the options from the settings; the processes of one machine share its processors."""
        workers = min(settings.num_workers, max(1, processors() // local_world_size))
        return cls(workers, device.type == "cuda", share, settings.worker_timeout)

    @property
    def processes(self) -> int:
        """The number of workers that are started: at most one for each processor."""
        return min(self.workers, processors())


def training_batches(
    dataset: Pairs,
    preprocessing: Preprocessing,
    plan: EpochPlan,
    start: Position,
    epochs: int,
    options: LoaderOptions,
) -> Iterator[StepBatch]:
    """Yield the steps from ``start`` to the end of the last epoch, each with the micro-batches that
    are in ``options.share``.

    Raises:
        DataError: A shard was changed, or a worker died or hung.
    """
    if start.epoch >= epochs:
        return
    share = options.share
    micro_batches = plan.from_position(start, epochs, dataset.order(plan), share)
    ahead = prefetch_factor(plan, preprocessing.image_size, options)
    under_way = UnderWay(options.processes)
    loader = _loader(dataset, preprocessing, micro_batches, options, under_way, ahead)
    batches = started(iter(loader))
    for epoch in range(start.epoch, epochs):
        for step in range(start.step if epoch == start.epoch else 0, plan.steps):
            count = len(share.of(plan.micro_batches(step)))
            read: list[Batch] = [next_batch(batches, under_way) for _ in range(count)]
            skipped = [pair for batch in read for pair in batch.skipped]
            with_pairs = [batch for batch in read if len(batch)]
            pairs = sum(map(len, read))
            # The trainer empties ``with_pairs`` when a step is done. A second list of the same
            # batches would keep their images in memory while the next step is read.
            del read
            yield StepBatch(epoch, step, with_pairs, skipped, pairs)


def prefetch_factor(plan: EpochPlan, image_size: int, options: LoaderOptions) -> int:
    """Choose how many micro-batches each worker has ready.

    Together they hold a whole step, so that the next one is there when this one is done, and one
    micro-batch more; or less, where that would take more than ``AHEAD_BYTES``.
    """
    step = -(-plan.effective // (plan.micro * options.share.world_size))
    room = AHEAD_BYTES // (plan.micro * 3 * image_size**2)
    workers = max(1, options.processes)
    return max(2, min(-(-step // workers) + 1, room // workers))


def evaluation_batches(
    dataset: PairSource, preprocessing: Preprocessing, batch_size: int, options: LoaderOptions
) -> Iterator[Batch]:
    """Yield the batches in ``options.share`` of all pairs in their own order.

    Empty batches are added, so that each process has as many as the others.

    Raises:
        DataError: A shard was changed, or a worker died or hung.
    """
    numbers, share = range(len(dataset)), options.share
    starts = numbers[::batch_size]
    mine = [starts[i] for i in share.of(len(starts))]
    chunks = ([(0, n) for n in numbers[i : i + batch_size]] for i in mine)
    under_way = UnderWay(options.processes)
    batches = started(iter(_loader(dataset, preprocessing, chunks, options, under_way)))
    for _ in mine:
        yield next_batch(batches, under_way)
    for _ in range(-(-len(starts) // share.world_size) - len(mine)):
        yield EMPTY_BATCH


def _loader(
    dataset: PairSource,
    preprocessing: Preprocessing,
    micro_batches: Iterable[list[tuple[int, Any]]],
    options: LoaderOptions,
    under_way: UnderWay,
    ahead: int = 2,
) -> "DataLoader[Batch | DataError]":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    items: Any  # the items become a Batch in _collate
    if preprocessing.read_images:
        workers = options.processes
        transform = make_transform(
            preprocessing.augmentation, preprocessing.image_size, preprocessing.squashed
        )
        items = _DecodedPairs(dataset, preprocessing, transform, under_way)
    else:
        workers = 0  # looking captions up takes less time than sending them between processes
        assert isinstance(dataset, PairDataset), "pairs of a stream have no number to look up"
        items = _CaptionedPairs(dataset, preprocessing)
    if workers:
        atexit.unregister(kill_workers)  # once is enough
        atexit.register(kill_workers)
    return DataLoader(
        items,
        batch_sampler=micro_batches,
        collate_fn=partial(_collate, preprocessing.captions.pad_token_id),
        worker_init_fn=ignore_signals,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=options.pin_memory,
        timeout=options.timeout if workers else 0,
        # Otherwise iter() draws a seed from the global generator, and what the model draws from it
        # would depend on how often a loader was made
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _Pair:
    number: int
    pixels: Tensor
    ids: list[int]


@dataclass(frozen=True, eq=False)
class _DecodedPairs(Dataset["_Pair | Skipped | DataError"]):
    """Maps (epoch, place) to a decoded pair; its augmentation depends on (seed, epoch, number)."""

    dataset: PairSource
    preprocessing: Preprocessing
    transform: Transform
    under_way: UnderWay

    def __getitem__(self, place: tuple[int, Any]) -> "_Pair | Skipped | DataError":
        (epoch, which), how = place, self.preprocessing
        self.under_way.set(f"pair {which}" if isinstance(which, int) else "a pair")
        item: _Pair | Skipped | DataError
        try:
            raw = self.dataset[which]
            self.under_way.set(f"{raw.key} in {raw.shard}")
            ids = how.captions.ids(raw, epoch)
            # Evaluation decodes in full, as the model's own processor would
            at_least = how.image_size if how.augmentation != "none" else 0
            image = decode_image(raw.image, at_least)
            pixels = self.transform(image, derived_seed(how.seed, epoch, raw.number))
            item = _Pair(raw.number, pixels, ids)
        except (BadImage, BadCaption) as error:
            item = Skipped(raw.shard, raw.key, str(error))
        except DataError as error:
            item = error  # torch would pass on only the text of an exception raised in a worker
        # Not reached after any other error: the pair is then what was under way
        self.under_way.set("")
        return item


@dataclass(frozen=True, eq=False)
class _CaptionedPairs(Dataset["_Pair | Skipped"]):
    """Maps (epoch, number) to the caption of a pair, without its image."""

    dataset: PairDataset
    preprocessing: Preprocessing

    def __getitem__(self, place: tuple[int, int]) -> "_Pair | Skipped":
        epoch, number = place
        named, reason = self.dataset.named(number), self.preprocessing.bad.get(number)
        if reason:
            return Skipped(named.shard, named.key, reason)
        try:
            ids = self.preprocessing.captions.ids(named, epoch)
        except BadCaption as error:
            return Skipped(named.shard, named.key, str(error))
        return _Pair(number, torch.empty(0, dtype=torch.uint8), ids)


def _collate(pad_token_id: int, items: "list[_Pair | Skipped | DataError]") -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    pairs = [item for item in items if isinstance(item, _Pair)]
    skipped = tuple(item for item in items if isinstance(item, Skipped))
    if not pairs:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), skipped)
    pixels = torch.stack([pair.pixels for pair in pairs])
    ids = padded([pair.ids for pair in pairs], pad_token_id)
    return Batch(pixels, ids, tuple(pair.number for pair in pairs), skipped)
