"""Sources of captions as token ids, and the table of all captions of a data set.

The table is made once and kept in the cache folder. It is opened through memory maps, so worker
processes share one copy. The name of its folder is a hash of all that determines its content:
the shards with their sizes and times, the caption template and the tokenizer. Its files are ``ids``
(all captions in a row), ``ends`` (where each caption ends) and ``counts`` [pairs] (the number of
captions of the pairs up to and including this one); and ``weights`` [captions], if captions are
drawn by their weight.
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
from typing import Any

import numpy as np

from clipft.core.cache import cache_folder, mark_used
from clipft.data.captions.template import BadCaption, CaptionTemplate, clean_caption
from clipft.data.captions.tokenizer import CaptionEncoder, lost_share
from clipft.data.order import derived_seed
from clipft.data.shards.dataset import PairDataset, RawPair

_FORMAT = "2"  # part of the folder's name: with a new number, all tables are made again
_ARRAYS = ("ids", "ends", "counts")
_WEIGHTS = "weights"
_CHUNK = 4096
# Part of the seed, so that the choice of a caption is independent of the augmentation
_CAPTION = 1

Numbers = np.ndarray[Any, np.dtype[Any]]


def _choice(
    captions: int, seed: int | None, epoch: int, number: int, weights: Numbers | None
) -> int:
    """Draw the caption that a pair has in an epoch; without a seed it is the first."""
    if captions == 1 or seed is None:
        return 0
    drawn = derived_seed(seed, epoch, number, _CAPTION)
    if weights is None:
        return drawn % captions
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends[:-1], drawn / 2**63 * ends[-1], side="right"))


@dataclass(frozen=True)
class LiveCaptions:
    """Captions that are tokenized each time, for streams: their captions come with the images."""

    template: CaptionTemplate
    encoder: CaptionEncoder
    seed: int | None = None

    @property
    def pad_token_id(self) -> int:
        return self.encoder.eos_token_id

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        """Tokenize the caption that a pair has in an epoch.

        Raises:
            BadCaption: The pair has no text.
        """
        found = self.template.weighted_captions(pair.caption, pair.metadata)
        weights = np.array([*found.values()]) if self.template.weights else None
        text = [*found][_choice(len(found), self.seed, epoch, pair.number, weights)]
        return self.encoder([text])[0].ids


@dataclass(frozen=True)
class NoCaptions:
    """An empty caption for each pair, for work on images alone."""

    pad_token_id: int = 0

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        return [self.pad_token_id]


@dataclass(frozen=True)
class CaptionFigures:
    """Figures of all captions; lengths are in tokens, before truncation, with start and end.

    ``cut`` captions are too long for the model. Together they lose ``lost_share`` of their tokens.
    ``none`` is the number of pairs without text.
    """

    captions: int
    median_tokens: float
    most_tokens: int
    cut: int
    lost_share: float
    none: int


@dataclass(frozen=True)
class CaptionTable:
    """The captions of all pairs. If ``seed`` is None, each pair always has its first caption."""

    figures: CaptionFigures
    pad_token_id: int
    seed: int | None
    ids_of_all: Numbers
    ends: Numbers
    counts: Numbers
    weights: Numbers | None = None
    folder: Path | None = None

    def ids(self, pair: RawPair, epoch: int) -> list[int]:
        """Look up the caption that a pair has in an epoch.

        Raises:
            BadCaption: The pair has no text.
        """
        first = int(self.counts[pair.number - 1]) if pair.number else 0
        captions = int(self.counts[pair.number]) - first
        if not captions:
            clean_caption(pair.caption)  # says why if the caption is not text
            raise BadCaption("empty caption")
        weights = None if self.weights is None else self.weights[first : first + captions]
        return self._ids(first + _choice(captions, self.seed, epoch, pair.number, weights))

    def _ids(self, caption: int) -> list[int]:
        start = int(self.ends[caption - 1]) if caption else 0
        found: list[int] = self.ids_of_all[start : int(self.ends[caption])].tolist()
        return found

    def further(self, pairs: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (pair number, ids) of all captions but the first, for the first ``pairs`` pairs."""
        counts = np.diff(self.counts[:pairs], prepend=0)
        for number in np.flatnonzero(counts > 1).tolist():
            last = int(self.counts[number])
            for caption in range(last - int(counts[number]) + 1, last):
                yield number, self._ids(caption)

    def by_pair(self) -> Iterator[list[bytes]]:
        """Yield the captions of each pair as bytes. Equal ids give equal bytes."""
        starts = np.concatenate([[0], self.ends])
        for first, last in pairwise([0, *self.counts.tolist()]):
            places = range(first, last)
            yield [self.ids_of_all[starts[at] : starts[at + 1]].tobytes() for at in places]

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned (not forked) worker maps the files itself instead of receiving a copy
        if self.folder:
            return _load, (self.folder, self.pad_token_id, self.seed, self.weights is not None)
        return super().__reduce__()  # type: ignore[return-value]


CaptionSource = CaptionTable | LiveCaptions | NoCaptions


def caption_table(
    pairs: PairDataset,
    template: CaptionTemplate,
    encoder: CaptionEncoder,
    seed: int | None,
    building: Callable[[], None],
) -> CaptionTable:
    """Open the table of ``pairs`` from the cache, or call ``building`` and make it.

    If the cache folder cannot be written to, the table is kept in memory only.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for part in (pairs.state(), template.state, encoder.vocabulary):
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogateescape")).digest())
    folder = cache_folder() / "captions" / digest.hexdigest()[:32]
    mark_used(folder)
    weighted = template.weights is not None
    try:
        return _load(folder, encoder.eos_token_id, seed, weighted)
    except (OSError, ValueError, KeyError, TypeError):
        building()
    table = _build(pairs, template, encoder, seed)
    try:
        _save(table, folder)
        return _load(folder, encoder.eos_token_id, seed, weighted)
    except (OSError, ValueError):  # the disk is full, or another run was faster
        return table


def _build(
    pairs: PairDataset, template: CaptionTemplate, encoder: CaptionEncoder, seed: int | None
) -> CaptionTable:
    counts, ids, ends, lengths = list[int](), list[Numbers](), list[Numbers](), list[int]()
    weights = list[float]()
    for start in range(0, len(pairs), _CHUNK):
        texts = list[str]()
        for number in range(start, min(start + _CHUNK, len(pairs))):
            try:
                captions = template.weighted_captions(*pairs.caption_and_metadata(number))
            except BadCaption:
                captions = {}
            counts.append(len(captions))
            texts += captions
            weights += captions.values()
        encoded = encoder(texts)
        lengths += [caption.length for caption in encoded]
        ids.append(np.array([token for caption in encoded for token in caption.ids], np.uint32))
        ends.append(np.array([len(caption.ids) for caption in encoded], np.int64))
    figures = CaptionFigures(
        captions=len(lengths),
        median_tokens=statistics.median(lengths or [0]),
        most_tokens=max(lengths, default=0),
        cut=sum(length > encoder.context for length in lengths),
        lost_share=lost_share(lengths, np.concatenate(ends).tolist()),
        none=counts.count(0),
    )
    ids_of_all = np.concatenate(ids)
    # CLIP's 49,408 ids fit into 16 bits, SigLIP 2's 256,000 do not
    dtype = np.uint16 if int(ids_of_all.max(initial=0)) < 1 << 16 else np.uint32
    return CaptionTable(
        figures,
        encoder.eos_token_id,
        seed,
        ids_of_all.astype(dtype),
        np.cumsum(np.concatenate(ends)),
        np.cumsum(counts),
        np.array(weights) if template.weights else None,
    )


def _save(table: CaptionTable, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".table-"))
    try:
        arrays = (table.ids_of_all, table.ends, table.counts)
        for name, array in zip(_ARRAYS, arrays, strict=True):
            np.save(temporary / f"{name}.npy", array)
        if table.weights is not None:
            np.save(temporary / f"{_WEIGHTS}.npy", table.weights)
        (temporary / "figures.json").write_text(json.dumps(asdict(table.figures)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged table may be there
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path, pad_token_id: int, seed: int | None, weighted: bool) -> CaptionTable:
    """
    Raises:
        OSError, ValueError, KeyError, TypeError: There is no table, or it is damaged.
    """
    figures = CaptionFigures(**json.loads((folder / "figures.json").read_text()))
    # Indexing a memmap is several times as slow as indexing a plain array over the same memory
    names = (*_ARRAYS, _WEIGHTS) if weighted else _ARRAYS
    mapped = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
    ids, ends, counts, *rest = map(np.asarray, mapped)
    weights = rest[0] if rest else None
    if weights is not None and len(weights) != len(ends):
        raise ValueError("the weights do not belong to the captions")
    if (len(counts) and int(counts[-1]) != len(ends)) or (len(ends) and int(ends[-1]) != len(ids)):
        raise ValueError("the arrays do not belong together")
    return CaptionTable(figures, pad_token_id, seed, ids, ends, counts, weights, folder)
