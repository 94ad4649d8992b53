"""Random access to the pairs of shards by number.

A shard is a plain tar. The members of a pair share a key: ``chair.jpg``, ``chair.txt`` and perhaps
``chair.json``. The index of a shard says where each member starts, so shuffling all pairs and
resuming in the middle of an epoch take no extra time. Images are read on access.
"""

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipft.config.settings import Settings
from clipft.core.common import counted, shell_command
from clipft.core.errors import DataError, UsageError
from clipft.core.files import did_you_mean_path
from clipft.core.text import NotText, decode
from clipft.data.order import EpochPlan
from clipft.data.packing.options import PackOptions
from clipft.data.shards.contents import PACK_HINT, contents_of, how_to_read
from clipft.data.shards.index import Shard, open_shard, printable, stamp_of
from clipft.data.shards.names import FIELDS, SPLITS, tars_in
from clipft.data.shards.tar import read_members
from clipft.data.skipped import Skipped


@dataclass(frozen=True)
class RawPair:
    """The bytes of one pair as stored in the shard; b"" for a missing caption or metadata."""

    number: int
    key: str
    shard: str
    image: bytes
    caption: bytes
    metadata: bytes = b""


@dataclass(frozen=True)
class PairDataset:
    """The pairs of some shards, numbered from 0 in the order of the shards.

    The data set has the first ``limit`` pairs (0: all), or only the ``chosen`` ones among them.
    """

    shards: Sequence[Shard]
    limit: int = 0
    chosen: tuple[int, ...] | None = None
    _starts: "np.ndarray[Any, np.dtype[np.int64]]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(shard) for shard in self.shards]
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        total = int(self._starts[-1])
        return min(total, self.limit) if self.limit else total

    def __getitem__(self, number: int) -> RawPair:
        """Read a pair.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        shard, row = self._locate(number)
        # Read first, because this raises if the shard has changed; then its keys may be missing
        members = _read(shard, row, FIELDS)
        return RawPair(number, shard.key(row), shard.path.name, *members)

    def first(self, most: int) -> "PairDataset":
        """Return the first ``most`` pairs, with the same numbers."""
        if self.chosen is not None:
            return PairDataset(self.shards, self.limit, self.chosen[:most])
        return PairDataset(self.shards, min(most, len(self)))

    def named(self, number: int) -> RawPair:
        """Return a pair with its key and shard, without reading its bytes."""
        shard, row = self._locate(number)
        return RawPair(number, shard.key(row), shard.path.name, b"", b"")

    def caption_and_metadata(self, number: int) -> tuple[bytes, bytes]:
        """Read the ``.txt`` and the ``.json`` of a pair but not its image; b"" if there is none.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        caption, metadata = _read(*self._locate(number), ("caption", "metadata"))
        return caption, metadata

    def image_end(self, number: int, most: int) -> bytes:
        """Read the last ``most`` bytes of an image, or all if it has fewer.

        Raises:
            DataError: The shard was changed or removed since it was indexed.
        """
        return _read(*self._locate(number), ("image",), most)[0]

    def metadata(self, number: int) -> dict[str, Any]:
        """Read the ``.json`` of a pair; empty if there is none or it is not an object."""
        return parse_metadata(self.caption_and_metadata(number)[1])

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[int]]:
        """Return the function (epoch, first) -> numbers of the pairs: shuffled in each epoch."""
        return plan.order

    @property
    def skipped(self) -> Sequence[Skipped]:
        return [skipped for shard in self.shards for skipped in shard.skipped]

    def identity(self) -> str:
        """A text that depends on the names, keys and sizes of the shards but not on the folder."""
        shards = (f"{s.path.name}:{len(s)}:{s.digest}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}{self._choice}"

    def state(self) -> str:
        """A text that changes with the path, size or time of any of the shards."""
        shards = (f"{s.path.resolve()}:{s.stamp}:{len(s)}" for s in self.shards)
        return ";".join(shards) + f";{len(self)}{self._choice}"

    @property
    def _choice(self) -> str:
        return "" if self.chosen is None else f";{','.join(map(str, self.chosen))}"

    @property
    def image_sizes(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The size of each pair's image in bytes, int64 [pairs]."""
        sizes = np.concatenate([shard.places[:, 0, 1] for shard in self.shards])
        return sizes[: len(self)] if self.chosen is None else sizes[list(self.chosen)]

    def _locate(self, number: int) -> tuple[Shard, int]:
        if self.chosen is not None:
            number = self.chosen[number]
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[which], number - int(self._starts[which])


def _read(shard: Shard, row: int, names: Sequence[str], last: int | None = None) -> list[bytes]:
    """Read members of one pair, b"" for an absent one, and check that the shard is unchanged. With
    ``last``, read only the last ``last`` bytes of each.

    The file is opened each time. This takes 10 microseconds, and no descriptor is kept open or
    inherited by a worker process.
    """
    try:
        places = [shard.places[row, FIELDS.index(name)].tolist() for name in names]
        if last is not None:
            places = [(at + max(0, size - last), min(size, last)) for at, size in places]
        file = os.open(shard.path, os.O_RDONLY)
        try:
            found = [os.pread(file, max(0, size), max(0, offset)) for offset, size in places]
            # The stamp is checked after reading (1 microsecond), so that it covers the bytes read
            stamp = stamp_of(os.fstat(file))
        finally:
            os.close(file)
        sizes = [max(0, size) for _, size in places]
        if stamp != shard.stamp or [len(part) for part in found] != sizes:
            raise OSError("another state of the shard than the indexed one")
    except (OSError, IndexError) as error:
        raise DataError(
            f"{shard.path} was changed or removed while it was in use",
            "restore the shard, then run `clipft resume`",
        ) from error
    return found


@dataclass(frozen=True)
class ChosenPairs:
    """Some pairs of a data set. They keep their numbers."""

    pairs: PairDataset
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> RawPair:
        return self.pairs[self.numbers[place]]


def open_pairs(folder: Path, limit: int = 0) -> PairDataset:
    """Open every ``*.tar`` of a folder, and use the first ``limit`` pairs (0: all).

    Raises:
        DataError: The folder does not exist, or has no tar (the message says what it has instead),
            or the tars have no complete pair.
    """
    paths = shard_paths(folder)
    dataset = PairDataset([open_shard(path) for path in paths], limit)
    if not len(dataset):
        raise _no_pair(folder, dataset)
    return dataset


def validation_pairs(settings: Settings) -> PairDataset:
    """Open ``{data_dir}/val``, or ``data_dir`` itself if the shards are directly in it.

    Raises:
        DataError: there are no pairs.
    """
    nested = settings.data_dir / "val"
    flat = not nested.exists() and tars_in(settings.data_dir)
    return open_pairs(settings.data_dir if flat else nested, settings.max_val_pairs)


def evaluation_pairs(settings: Settings, split: str = "auto") -> tuple[str, PairDataset]:
    """Open the pairs to evaluate, and return the name of their split with them.

    With ``split`` "auto", these are the test pairs if there are any, otherwise the validation
    pairs. "test" and "val" choose the split.

    Raises:
        DataError: there are no pairs.
    """
    test = settings.data_dir / "test"
    if split == "test" or (split == "auto" and tars_in(test)):
        return "test", open_pairs(test, settings.max_val_pairs)
    return "val", validation_pairs(settings)


def general_pairs(settings: Settings) -> PairDataset | None:
    """Open the general set that ``--preserve`` uses, or return None if none is given.

    It is ``{preserve_data}/train``, or ``preserve_data`` itself if the shards are directly in it.

    Raises:
        DataError: there are no pairs.
        UsageError: the settings of ``--preserve`` do not fit together.
    """
    if settings.preserve and settings.accumulation == "local":
        raise UsageError(
            "--preserve cannot be combined with --accumulation local",
            "use --accumulation exact, which is the default",
        )
    if settings.preserve_data is None:
        return None
    if not settings.preserve:
        raise UsageError(
            f"--preserve-data {settings.preserve_data} has no effect without a weight",
            "add --preserve 1, for example",
        )
    nested = settings.preserve_data / "train"
    flat = not nested.exists() and tars_in(settings.preserve_data)
    try:
        return open_pairs(settings.preserve_data if flat else nested)
    except DataError as error:
        error.hint = error.hint.replace("--data-dir", "--preserve-data")
        raise


def _no_pair(folder: Path, dataset: PairDataset) -> DataError:
    """Build the error for shards without pairs; it says what their members are."""
    shards = counted(len(dataset.shards), "shard")
    reasons = Counter(skipped.reason for skipped in dataset.skipped)
    why = "".join(f", {count:,} x {reason}" for reason, count in reasons.most_common(3))
    names = [
        member.name for member in read_members(dataset.shards[0].path) if member.kind == "file"
    ]
    first = f" (the first members are {', '.join(map(printable, names[:4]))})" if names else ""
    return DataError(
        f"no pair of image and caption in {shards} of {folder}{why}{first}",
        "in a shard, the .jpg and the .txt or .json of a pair have the same name up to the first "
        f"dot; {PACK_HINT}",
    )


def shard_paths(folder: Path) -> list[Path]:
    """Return every ``*.tar`` of a folder, sorted by name.

    Raises:
        DataError: The folder does not exist, or has no tar (the message says what it has instead).
    """
    paths = tars_in(folder)
    if paths:
        return paths
    if re.match(r"[a-z0-9]+:", str(folder)):
        raise DataError(
            f"{folder} is not a folder", "clipft reads no URLs or pipes: download the shards first"
        )
    if hint := _split_hint(folder):
        split = "training" if folder.name == "train" else "validation"
        raise DataError(f"there is no {split} split: no *.tar in {folder}", hint)
    if not folder.is_dir():
        raise _no_folder(folder)
    found = contents_of(folder)
    raise DataError(f"no .tar in {folder}: found {found}", how_to_read(folder, found))


def _no_folder(folder: Path) -> DataError:
    """Build the error for a folder that does not exist; it says what its parent has instead."""
    above = folder.parent if folder.name in SPLITS else folder
    if above.is_dir() and not any(tars_in(above / split) for split in SPLITS):
        found = contents_of(above)
        if found.endings:
            hint = how_to_read(above, found)
            return DataError(f"no folder {folder}: {above} holds {found}", hint)
    return DataError(
        f"no folder {folder}",
        did_you_mean_path(above)
        or "name the folder that has train/ and val/ in it with --data-dir, make it with "
        "`clipft pack`, or fetch it with `clipft sync`",
    )


def _split_hint(folder: Path) -> str:
    """Return a hint with the command that splits the pairs, if ``folder`` is a train or val folder
    without shards and there are shards that were never split; otherwise ""."""
    whole = folder.parent if folder.name == "train" else folder.parent / "train"
    if folder.name not in {"train", "val"} or any(folder.glob("[!.]*")):
        return ""
    if folder.name == "val" and not tars_in(whole):
        whole = folder.parent
    pairs = sum(len(open_shard(path)) for path in tars_in(whole))
    if pairs < 2:
        return ""
    root = folder.parent if folder.parent.name not in {"", ".."} else folder.parent.resolve()
    target = root.with_name(f"{root.name}-split")
    share = max(PackOptions.model_fields["val_share"].default, math.ceil(100 / pairs) / 100)
    packing = shell_command("pack", whole, target, "--val-share", f"{share:g}")
    return f"split the pairs with `{packing}`, then use --data-dir {shlex.quote(str(target))}"


def parse_metadata(data: bytes) -> dict[str, Any]:
    """Parse the ``.json`` of a pair; empty if it is not a JSON object."""
    try:
        return read_metadata(data)
    except ValueError:
        return {}


def metadata_fault(data: bytes) -> str:
    """Return why the ``.json`` of a pair cannot be used, or "" if it can."""
    try:
        read_metadata(data)
    except ValueError as error:
        return f"the metadata is {error}"
    return ""


def read_metadata(data: bytes) -> dict[str, Any]:
    """Parse the ``.json`` of a pair; empty if there is none, or if it is not an object.

    Raises:
        ValueError: It is not JSON. The message completes "the metadata is".
    """
    if not data:
        return {}
    try:
        value = json.loads(decode(data))
    except NotText:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    return value if isinstance(value, dict) else {}
