"""All captions of a data set as token ids, tokenised once and kept in the cache folder.

Opened through memory maps, so that worker processes share one copy. The folder's name is a
hash of all that decides its content: the shards with their sizes and times, the template, the
tokenizer. Files: ``ids``, all captions one after the other; ``ends``, where each of them ends;
``counts`` [pairs], how many captions the pairs up to and with this one have.
"""

import hashlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipft.core.common import cache_folder
from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.captions.tokenizer import CaptionEncoder, Encoded
from clipft.data.order import derived_seed
from clipft.data.shards.dataset import PairDataset, RawPair

_CAPTION = 1
"""Keeps the draw of the caption apart from that of the augmentation."""


class CaptionSource(Protocol):
    """``pad_token_id`` pads the rows of a batch."""

    @property
    def pad_token_id(self) -> int: ...

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        """
        Raises:
            BadCaption: the pair has no text.
        """


def drawn(captions: int, seed: int | None, epoch: int, number: int) -> int:
    """Which of ``captions`` a pair has in ``epoch``; seed None: the first."""
    if captions == 1 or seed is None:
        return 0
    return derived_seed(seed, epoch, number, _CAPTION) % captions


@dataclass(frozen=True)
class LiveCaptions:
    """Tokenised each time: for streams, whose captions come with the pictures."""

    template: CaptionTemplate
    encoder: CaptionEncoder
    seed: int | None = None

    @property
    def pad_token_id(self) -> int:
        return self.encoder.eos_token_id

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        texts = self.template.captions(pair.caption, pair.metadata)
        text = texts[drawn(len(texts), self.seed, epoch, pair.number)]
        return self.encoder([text])[0].ids


@dataclass(frozen=True)
class NoCaptions:
    """Where the pictures alone matter."""

    pad_token_id: int = 0

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        return [self.pad_token_id]


_FORMAT = "1"
_CHUNK = 4096
_ARRAYS = ("ids", "ends", "counts")

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class CaptionFigures:
    """Of the captions before any cut, in tokens with start and end; ``cut`` are those too
    long for the model, ``none`` the pairs without any text."""

    captions: int
    median_tokens: float
    most_tokens: int
    cut: int
    none: int


@dataclass(frozen=True)
class CaptionTable:
    """A ``CaptionSource``. ``seed`` None: the first caption of each pair in every epoch."""

    figures: CaptionFigures
    pad_token_id: int
    seed: int | None
    ids_of_all: Numbers
    ends: Numbers
    counts: Numbers
    folder: Path | None = None

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        first = int(self.counts[pair.number - 1]) if pair.number else 0
        captions = int(self.counts[pair.number]) - first
        if not captions:
            raise BadCaption("empty caption")
        which = first + drawn(captions, self.seed, epoch, pair.number)
        start = int(self.ends[which - 1]) if which else 0
        found: list[int] = self.ids_of_all[start : int(self.ends[which])].tolist()
        return found

    def by_pair(self) -> Iterator[list[bytes]]:
        """The captions of each pair, as bytes that are equal for equal ids."""
        starts = np.concatenate([[0], self.ends])
        for first, last in pairwise([0, *self.counts.tolist()]):
            places = range(first, last)
            yield [self.ids_of_all[starts[at] : starts[at + 1]].tobytes() for at in places]

    def __reduce__(self) -> tuple[Any, ...]:
        # A started (not forked) worker maps the files anew rather than being sent a copy
        if self.folder:
            return _load, (self.folder, self.pad_token_id, self.seed)
        return super().__reduce__()  # type: ignore[return-value]


def caption_table(
    pairs: PairDataset,
    template: CaptionTemplate,
    encoder: CaptionEncoder,
    seed: int | None,
    building: Callable[[], None],
) -> CaptionTable:
    """The table of ``pairs``, from the cache or made now; ``building`` is told before."""
    digest = hashlib.sha256(_FORMAT.encode())
    for part in (pairs.state(), template.source, encoder.vocabulary):
        digest.update(hashlib.sha256(part.encode()).digest())
    folder = cache_folder() / "captions" / digest.hexdigest()[:32]
    try:
        return _load(folder, encoder.eos_token_id, seed)
    except (OSError, ValueError, KeyError, TypeError):
        building()
    table = _build(pairs, template, encoder, seed)
    try:
        _save(table, folder)
        return _load(folder, encoder.eos_token_id, seed)
    except (OSError, ValueError):  # no room, or another run was faster
        return table


def _build(
    pairs: PairDataset, template: CaptionTemplate, encoder: CaptionEncoder, seed: int | None
) -> CaptionTable:
    counts, ids, ends, lengths = list[int](), list[Numbers](), list[Numbers](), list[int]()
    for texts in _texts(pairs, template):
        counts += map(len, texts)
        encoded = encoder([text for several in texts for text in several])
        lengths += [caption.length for caption in encoded]
        ids.append(_flat(encoded))
        ends.append(np.array([len(caption.ids) for caption in encoded], np.int64))
    figures = CaptionFigures(
        captions=len(lengths),
        median_tokens=statistics.median(lengths or [0]),
        most_tokens=max(lengths, default=0),
        cut=sum(length > encoder.context for length in lengths),
        none=counts.count(0),
    )
    whole = np.concatenate(ids)
    small = np.uint16 if int(whole.max(initial=0)) < 1 << 16 else np.uint32
    return CaptionTable(
        figures,
        encoder.eos_token_id,
        seed,
        whole.astype(small),
        np.cumsum(np.concatenate(ends)),
        np.cumsum(counts),
    )


def _texts(pairs: PairDataset, template: CaptionTemplate) -> Iterator[list[list[str]]]:
    """The captions of all pairs, some thousands at a time; [] for a pair without text."""
    for start in range(0, len(pairs), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(pairs)))
        yield [_captions(*pairs.caption_and_metadata(number), template) for number in numbers]


def _captions(caption: bytes, metadata: bytes, template: CaptionTemplate) -> list[str]:
    try:
        return template.captions(caption, metadata)
    except BadCaption:
        return []


def _flat(encoded: list[Encoded]) -> Numbers:
    return np.array([token for caption in encoded for token in caption.ids], np.uint32)


def _save(table: CaptionTable, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".table-"))
    try:
        for name, array in zip(_ARRAYS, _arrays(table), strict=True):
            np.save(temporary / f"{name}.npy", array)
        (temporary / "figures.json").write_text(json.dumps(asdict(table.figures)))
        shutil.rmtree(folder, ignore_errors=True)  # of a broken table
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _arrays(table: CaptionTable) -> tuple[Numbers, Numbers, Numbers]:
    return table.ids_of_all, table.ends, table.counts


def _load(folder: Path, pad_token_id: int, seed: int | None) -> CaptionTable:
    """
    Raises:
        OSError, ValueError, KeyError, TypeError: no table, or a broken one.
    """
    figures = CaptionFigures(**json.loads((folder / "figures.json").read_text()))
    mapped = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    ids, ends, counts = map(np.asarray, mapped)  # memmap's own indexing is slow
    if (len(counts) and int(counts[-1]) != len(ends)) or (len(ends) and int(ends[-1]) != len(ids)):
        raise ValueError("the arrays do not belong together")
    return CaptionTable(figures, pad_token_id, seed, ids, ends, counts, folder)
