"""Reads shards in sequence, for catalogues that are too slow or too large for random access: on
slow disks, on network file systems, or in a bucket.

A ``ShardSource`` lists and opens the tars: a folder here, S3 in ``storage/s3/remote_shards.py``.

The order depends only on the seed and the epoch: the shards are shuffled, then every ``buffer``
pairs. The main process reads and the workers decode, so the number of workers does not change the
order. A thread reads one buffer ahead, so two buffers of undecoded pairs are in memory. A resumed
run skips whole shards and, in the buffer where it stopped, the pairs that it has trained on.
"""

import json
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from webdataset.tariterators import group_by_keys

from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.order import EpochPlan, derived_seed
from clipft.data.shards.dataset import RawPair
from clipft.data.shards.folders import shard_paths
from clipft.data.shards.index import open_shard, printable
from clipft.data.shards.names import FileName, pair_up, parse_name
from clipft.data.skipped import Skipped

T = TypeVar("T")

# Constants in the seeds, so that the two shuffles are independent
_SHARDS, _BUFFER = 1, 2
_POLL_SECONDS = 0.1


class ShardSource(Protocol):
    """Lists and opens tars and the ``sizes*.json`` beside them, by name."""

    @property
    def place(self) -> str:
        """The location of the tars, for messages."""

    def names(self) -> Sequence[str]:
        """Return the names of the tars, sorted.

        Raises:
            DataError: There is none.
        """

    def sizes(self) -> dict[str, bytes]:
        """Return the content of each ``sizes*.json``."""

    def open(self, name: str) -> IO[bytes]:
        """Open a tar for sequential reading from the start."""

    def count(self, name: str) -> tuple[int, Sequence[Skipped]]:
        """Count the pairs of a tar that is in no ``sizes*.json``; also return the skipped pairs.

        Raises:
            DataError: The tar cannot be read, or this source cannot count.
        """


@dataclass(frozen=True)
class ShardFolder:
    """A ``ShardSource`` that is a folder."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    def names(self) -> Sequence[str]:
        return [path.name for path in shard_paths(self.folder)]

    def sizes(self) -> dict[str, bytes]:
        paths = sorted(self.folder.glob("sizes*.json"))
        return {path.name: path.read_bytes() for path in paths}

    def open(self, name: str) -> IO[bytes]:
        return (self.folder / name).open("rb")

    def count(self, name: str) -> tuple[int, Sequence[Skipped]]:
        indexed = open_shard(self.folder / name)
        return len(indexed), indexed.skipped


@dataclass(frozen=True)
class StreamShard:
    """A tar. Only its first ``pairs`` pairs are used."""

    name: str
    pairs: int
    source: ShardSource


@dataclass(frozen=True)
class PairStream:
    """Pairs to train on, like a ``PairDataset`` but read in sequence instead of by number."""

    shards: Sequence[StreamShard]
    skipped: Sequence[Skipped]
    buffer: int

    def __len__(self) -> int:
        return sum(shard.pairs for shard in self.shards)

    def __getitem__(self, pair: RawPair) -> RawPair:
        # ``order`` yields the pairs themselves, which the main process has read already
        return pair

    def identity(self) -> str:
        """A text that is equal for the same data in the same order, so it includes the buffer."""
        names = ";".join(f"{shard.name}:{shard.pairs}" for shard in self.shards)
        return f"{names};{len(self)};buffer {self.buffer}"

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[RawPair]]:
        """Return the function (epoch, first) -> pairs of the epoch from the ``first``-th on."""
        return partial(self._shuffled, plan.seed)

    def _shuffled(self, seed: int, epoch: int, first: int) -> Iterator[RawPair]:
        buffer = first // self.buffer
        pairs = _read_ahead(self._in_sequence(seed, epoch, buffer * self.buffer), self.buffer)
        skip = first % self.buffer
        for start in range(buffer * self.buffer, len(self), self.buffer):
            count = min(self.buffer, len(self) - start)
            held = [next(pairs) for _ in range(count)]
            draw = np.random.default_rng([seed, epoch, _BUFFER, start])
            for place in draw.permutation(count)[skip:]:
                yield held[place]
            skip = 0

    def _in_sequence(self, seed: int, epoch: int, first: int) -> Iterator[RawPair]:
        """Yield the pairs shard by shard, with the shards shuffled for the epoch."""
        starts = np.cumsum([0, *(shard.pairs for shard in self.shards)])
        draw = np.random.default_rng(derived_seed(seed, epoch, _SHARDS))
        for which in draw.permutation(len(self.shards)):
            shard = self.shards[which]
            if first >= shard.pairs:
                first -= shard.pairs
                continue
            yield from _read_shard(shard, int(starts[which]), first)
            first = 0


def open_stream(source: ShardSource | Path, buffer: int, limit: int = 0) -> PairStream:
    """Open the shards of a source or folder; with ``limit`` 0, all pairs are used.

    The numbers of pairs are taken from ``sizes*.json`` beside the shards, which ``clipft pack`` and
    other tools write (``{"00000.tar": 1000}``). The pairs of shards that it does not list are
    counted.

    Raises:
        DataError: There is no folder, no tar, or no pair; or a ``sizes*.json`` is wrong.
    """
    if isinstance(source, Path):
        source = ShardFolder(source)
    names, sizes = source.names(), dict[str, int]()
    for file, text in source.sizes().items():
        try:
            found = {str(name): int(pairs) for name, pairs in json.loads(text).items()}
            if min(found.values(), default=0) < 0:
                raise ValueError("a number is below 0")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source.place}/{file} does not map shards to numbers of pairs: {error}",
                "remove the file: clipft then counts the pairs itself",
            ) from error
        sizes |= found
    shards, skipped, left = list[StreamShard](), list[Skipped](), limit
    for name in names:
        pairs = sizes.get(name)
        if pairs is None:
            pairs, bad = source.count(name)
            skipped += bad
        used = min(pairs, left) if limit else pairs
        left -= used
        if used:
            shards.append(StreamShard(name, used, source))
    if not shards:
        raise DataError(
            f"no pair in the shards of {source.place}", "run `clipft inspect` to see what is broken"
        )
    return PairStream(shards, skipped, buffer)


def _read_shard(shard: StreamShard, start: int, first: int) -> Iterator[RawPair]:
    """Yield the pairs of a shard from the ``first``-th on; its pairs are numbered from ``start``.

    Raises:
        DataError: The shard cannot be read, is truncated, or has fewer pairs than expected.
    """
    row, where = 0, f"{shard.source.place}/{shard.name}"
    try:
        with shard.source.open(shard.name) as file:
            for key, parts in _grouped_members(file):
                if row >= shard.pairs:
                    return
                if row >= first:
                    caption, metadata = parts.get("caption", b""), parts.get("metadata", b"")
                    image, shown = parts["image"], printable(key)
                    yield RawPair(start + row, shown, shard.name, image, caption, metadata)
                row += 1
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"cannot read {where} to its end: {error}",
            "fetch it again, then continue with `clipft resume`",
        ) from error
    if row < shard.pairs:
        raise DataError(
            f"{where} gave {counted(row, 'pair')} in sequence, but {shard.pairs} were expected",
            "the files of a pair must follow each other in the shard: pack it again with "
            "`clipft pack`, train without --stream, or correct sizes.json beside it",
        )


def _grouped_members(file: IO[bytes]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Yield the key and the contents of consecutive members that share a key and form a pair."""
    samples = group_by_keys(
        _members(file),
        keys=lambda path: (_parsed(path).sample, path),
        lcase=False,
        handler=_pass_over_duplicate,
    )
    for members in samples:
        sample, files = members.pop("__key__"), dict[str, dict[str, bytes]]()
        del members["__url__"]
        for path, data in members.items():
            name = _parsed(path)  # of two files of the same kind, the index uses the first
            files.setdefault(name.key, {}).setdefault(name.kind, data)
        for key, parts, reason in pair_up(sample, files):
            if not reason:
                yield key, parts


def _pass_over_duplicate(error: Exception) -> bool:
    """Use the first of two members with the same name, as the index does."""
    if isinstance(error, ValueError):
        return True
    raise error


def _parsed(path: str) -> FileName:
    name = parse_name(path)
    assert name  # ``_members`` yields no other
    return name


def _members(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the names and contents of the files that can belong to a pair, in order."""
    # ignore_zeros: continue with a tar that was appended to another, where WebDataset's reader ends
    with tarfile.open(fileobj=file, mode="r|*", ignore_zeros=True) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() and parse_name(info.name) else None
            if content:
                yield {"fname": info.name, "data": content.read(), "__url__": ""}
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them


def _read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield ``items``, which a thread reads up to ``count`` ahead. Its errors are raised here."""
    queue: Queue[tuple[str, Any]] = Queue(count)
    unwanted = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not unwanted.is_set():
            try:
                # Without a timeout, the thread would wait forever for a reader that has gone
                return queue.put((kind, value), timeout=_POLL_SECONDS)
            except Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put("item", item)
                if unwanted.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        unwanted.set()
        while True:  # free the memory of the pairs that were read ahead
            try:
                queue.get_nowait()
            except Empty:
                break
