"""Decodes pairs into model input: the part of the loader that runs in its workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch.utils.data import Dataset

from clipft.core.errors import DataError
from clipft.core.patches import Patches
from clipft.data.captions.table import CaptionSource
from clipft.data.captions.template import BadCaption
from clipft.data.images.augmentation import Shift, Transform
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
from clipft.data.order import derived_seed
from clipft.data.shards.dataset import PairDataset, RawPair
from clipft.data.skipped import Skipped
from clipft.data.workers import SharedPixels, UnderWay


class PairSource(Protocol):
    """The pairs that a worker reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any, /) -> RawPair:
        """Read the pair at a place: a number, or an item that ``order`` yields.

        Raises:
            DataError: The file with the pair was changed or removed.
        """


@dataclass(frozen=True)
class Preprocessing:
    """How raw bytes become model input of the sizes in ``ModelInputs``.

    If the features of the vision tower are known already, ``read_images`` is False and no image is
    read. Then ``bad`` maps the numbers of pairs whose images cannot be used to the reason.
    """

    captions: CaptionSource
    image_size: int
    augmentation: str
    seed: int
    squashed: bool = False
    read_images: bool = True
    bad: Mapping[int, str] = field(default_factory=dict)
    patches: Patches | None = None

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        """The shape of the uint8 pixels of an image; (0,) if no images are read."""
        if not self.read_images:
            return (0,)
        return self.patches.shape if self.patches else (3, self.image_size, self.image_size)


Places: TypeAlias = list[tuple[int, Any]]
"""Pairs to decode: the epoch and the place of each."""


class DecodingTask(NamedTuple):
    """The places of a chunk, the slot for its pixels, and whether its micro-batch ends with it."""

    slot: int
    places: Places
    ends: bool


@dataclass
class DecodedChunk:
    """The decoded pairs of a task. Their pixels are in the first rows of its slot."""

    slot: int
    ends: bool
    numbers: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class ChunkDecoder(Dataset["DecodedChunk | DataError"]):
    """Decodes the pairs of a task into a chunk, in a worker.

    The augmentation of a pair depends only on the seed, the epoch and the pair's number.
    """

    dataset: PairSource
    preprocessing: Preprocessing
    shared: SharedPixels
    under_way: UnderWay
    leave_shift: bool

    @cached_property
    def transform(self) -> Transform:
        how = self.preprocessing
        return Transform(
            how.augmentation, how.image_size, how.squashed, self.leave_shift, how.patches
        )

    def __getitem__(self, task: DecodingTask) -> "DecodedChunk | DataError":
        chunk = DecodedChunk(task.slot, task.ends)
        add = self._decode if self.preprocessing.read_images else self._look_up
        for epoch, place in task.places:
            try:
                add(chunk, epoch, place)
            except DataError as error:
                return error  # torch would pass on only the text of what a worker raises
        return chunk

    def _decode(self, chunk: DecodedChunk, epoch: int, place: Any) -> None:
        how = self.preprocessing
        self.under_way.set(f"pair {place}" if isinstance(place, int) else "a pair")
        raw = self.dataset[place]
        self.under_way.set(f"{raw.key} in {raw.shard}")
        try:
            ids = how.captions.ids(raw, epoch)
            # Evaluation decodes in full, as the model's own processor would
            at_least = how.image_size if how.augmentation != "none" else 0
            image = decode_image(raw.image, at_least)
        except (BadImage, BadCaption) as error:
            chunk.skipped.append(Skipped(raw.shard, raw.key, str(error)))
        else:
            out = self.shared.slots[chunk.slot, len(chunk.numbers)]
            shift = self.transform.write(image, derived_seed(how.seed, epoch, raw.number), out)
            chunk.shifts += [shift] if shift else []
            chunk.numbers.append(raw.number)
            chunk.ids.append(ids)
        # Not reached after any other error, so that its message names this pair
        self.under_way.set("")

    def _look_up(self, chunk: DecodedChunk, epoch: int, number: int) -> None:
        """Add the caption of a pair, without its image."""
        assert isinstance(self.dataset, PairDataset)
        named, reason = self.dataset.named(number), self.preprocessing.bad.get(number)
        try:
            if reason:
                raise BadImage(reason)
            chunk.ids.append(self.preprocessing.captions.ids(named, epoch))
            chunk.numbers.append(number)
        except (BadImage, BadCaption) as error:
            chunk.skipped.append(Skipped(named.shard, named.key, str(error)))
