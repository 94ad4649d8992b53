"""Shards read in sequence, for catalogues that random access would starve: slow disks, network
file systems, and more than the disk holds.

Where the shards lie is the business of a ``ShardSource``: a folder, or whatever else lists and
opens tars; storage has one that reads from S3.

The order is a function of (seed, epoch): the shards are shuffled, then every ``buffer`` pairs
that follow each other. The main process reads, workers decode, so their number changes nothing;
a thread reads one buffer ahead. A run goes on at its place by skipping whole shards and, of
the buffer it stopped in, the pairs that were trained on. Memory: two buffers of stored bytes.
"""

import json
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from webdataset.tariterators import tar_file_iterator

from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.order import EpochPlan, derived_seed
from clipft.data.shards.dataset import RawPair, shard_paths
from clipft.data.shards.index import Skipped, member_of, open_shard, printable

T = TypeVar("T")

_SHARDS, _BUFFER = 1, 2
"""Keep the two shuffles apart."""
_POLL = 0.1
"""Seconds after which a reading thread looks whether it is still wanted."""


class ShardSource(Protocol):
    """Tars and the ``sizes*.json`` beside them, by name."""

    @property
    def place(self) -> str:
        """Where they lie, for people."""

    def names(self) -> Sequence[str]:
        """Of the tars, sorted.

        Raises:
            DataError: there is none.
        """

    def sizes(self) -> dict[str, bytes]:
        """The content of each ``sizes*.json``."""

    def open(self, name: str) -> IO[bytes]:
        """A tar from its start, to be read in sequence."""

    def count(self, name: str) -> tuple[int, Sequence[Skipped]]:
        """Pairs of a tar that no ``sizes*.json`` names, and those that are none.

        Raises:
            DataError: it cannot be read, or not be counted here.
        """


@dataclass(frozen=True)
class ShardFolder:
    """The source that is a folder."""

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
    """One tar, and how many pairs of it are used: the first so many."""

    name: str
    pairs: int
    source: ShardSource

    @property
    def where(self) -> str:
        return f"{self.source.place}/{self.name}"


@dataclass(frozen=True)
class PairStream:
    """The face of ``PairDataset`` for training: pairs come by their order, not by number."""

    shards: Sequence[StreamShard]
    skipped: Sequence[Skipped]
    buffer: int

    def __len__(self) -> int:
        return sum(shard.pairs for shard in self.shards)

    def __getitem__(self, pair: RawPair) -> RawPair:
        return pair

    def identity(self) -> str:
        """As that of ``PairDataset``, and the buffer, which shapes the order."""
        names = ";".join(f"{shard.name}:{shard.pairs}" for shard in self.shards)
        return f"{names};{len(self)};buffer {self.buffer}"

    def order(self, plan: EpochPlan) -> Callable[[int, int], Iterator[RawPair]]:
        return lambda epoch, first: self._from(plan.seed, epoch, first)

    def _from(self, seed: int, epoch: int, first: int) -> Iterator[RawPair]:
        """The epoch's pairs in order, from the ``first``-th on."""
        buffer = first // self.buffer
        pairs = _ahead(self._in_sequence(seed, epoch, buffer * self.buffer), self.buffer)
        skip = first % self.buffer
        for start in range(buffer * self.buffer, len(self), self.buffer):
            count = min(self.buffer, len(self) - start)
            held = [next(pairs) for _ in range(count)]
            draw = np.random.default_rng([seed, epoch, _BUFFER, start])
            for place in draw.permutation(count)[skip:]:
                yield held[place]
            skip = 0

    def _in_sequence(self, seed: int, epoch: int, first: int) -> Iterator[RawPair]:
        """Pairs as the shards hold them, the shards in the epoch's order."""
        starts = np.cumsum([0, *(shard.pairs for shard in self.shards)])
        draw = np.random.default_rng(derived_seed(seed, epoch, _SHARDS))
        for which in draw.permutation(len(self.shards)):
            shard = self.shards[which]
            if first >= shard.pairs:
                first -= shard.pairs
                continue
            yield from _read(shard, int(starts[which]), first)
            first = 0


def open_stream(source: ShardSource | Path, buffer: int, limit: int = 0) -> PairStream:
    """Shards of a source or folder; their numbers of pairs from ``sizes*.json`` beside them,
    else counted.

    Raises:
        DataError: no folder, no tar, or nothing in it.
    """
    if isinstance(source, Path):
        source = ShardFolder(source)
    names = source.names()
    sizes, shards, skipped, left = _sizes(source), list[StreamShard](), list[Skipped](), limit
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
        raise DataError(f"no pair in the shards of {source.place}", "see `clipft inspect`")
    return PairStream(shards, skipped, buffer)


def _sizes(source: ShardSource) -> dict[str, int]:
    """``{"00000.tar": 1000}``, as ``clipft pack`` and others write it."""
    sizes: dict[str, int] = {}
    for file, text in source.sizes().items():
        try:
            found = {str(name): int(pairs) for name, pairs in json.loads(text).items()}
            if min(found.values(), default=0) < 0:
                raise ValueError("a number below 0")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source.place}/{file} does not give numbers of pairs by shard: {error}",
                "remove it: the shards are counted then",
            ) from error
        sizes |= found
    return sizes


def _read(shard: StreamShard, start: int, first: int) -> Iterator[RawPair]:
    """The pairs of one shard from its ``first``-th on, numbered from ``start``.

    Raises:
        DataError: it cannot be read, is cut off, or holds another number of pairs.
    """
    row = 0
    try:
        with shard.source.open(shard.name) as file:
            for key, members in _grouped(file):
                if row >= shard.pairs:
                    return
                if row >= first:
                    yield _pair(shard, start + row, key, members)
                row += 1
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"cannot read {shard.where} to its end: {error}",
            "fetch it again, then `clipft resume`",
        ) from error
    if row < shard.pairs:
        raise DataError(
            f"{shard.where} gave {counted(row, 'pair')} in sequence, {shard.pairs} were expected",
            "the files of a pair must follow each other: `clipft pack` it anew, or train "
            "without --stream; or mend sizes.json beside it",
        )


def _pair(shard: StreamShard, number: int, key: str, members: dict[str, bytes]) -> RawPair:
    caption, metadata = members.get("caption", b""), members.get("metadata", b"")
    return RawPair(number, printable(key), shard.name, members["image"], caption, metadata)


def _grouped(file: Any) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Members that follow each other and share a key, where they make a pair."""
    wanted = tar_file_iterator(file, skip_meta=None, select_files=lambda n: bool(member_of(n)))
    current, members = "", dict[str, bytes]()
    for member in wanted:
        key, kind = member_of(member["fname"]) or ("", "")
        if key != current:
            if _is_pair(members):
                yield current, members
            current, members = key, {}
        members.setdefault(kind, member["data"])
    if _is_pair(members):
        yield current, members


def _is_pair(members: dict[str, bytes]) -> bool:
    return "image" in members and bool(members.keys() & {"caption", "metadata"})


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """``items``, read by a thread that is at most ``count`` ahead; its errors come through."""
    queue: Queue[tuple[str, Any]] = Queue(count)
    unwanted = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not unwanted.is_set():
            try:
                return queue.put((kind, value), timeout=_POLL)
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

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
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
        while True:  # let the pairs that were read ahead go
            try:
                queue.get_nowait()
            except Empty:
                break
