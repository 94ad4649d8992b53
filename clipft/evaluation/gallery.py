"""What the report's gallery needs of a model, kept by the run while it has the embeddings:
for some queries the first pictures and the place of the first right one.

Right are all pictures of the query's caption, not its own pair's alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipft.core.files import read_json, write_json
from clipft.data.captions.table import CaptionTable
from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.images import BadImage, decode_image
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.embed import Embeddings

SHOWN = 5
_QUERIES = 1000
_BLOCK = 64
"""Queries compared at once: bounds the memory to a block times the candidates."""


@dataclass(frozen=True)
class Rankings:
    """By query: its pair's number, the rank of its first right picture (from 1), and the
    pairs' numbers of the first ``SHOWN`` pictures. ``data`` is the ``data_name`` of the pairs."""

    data: str
    queries: list[int]
    ranks: list[int]
    first: list[list[int]]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Rankings | None":
        """None: there is no such file, or not one of ours."""
        try:
            return cls(**(read_json(path) or {}))
        except TypeError:
            return None


@dataclass(frozen=True)
class Ranker:
    """Of one data set. ``groups``, int64 [pairs]: equal numbers for equal captions."""

    groups: Tensor
    data: str

    @classmethod
    def of(cls, pairs: PairDataset, captions: CaptionTable) -> "Ranker":
        known: dict[bytes, int] = {}
        groups = [
            known.setdefault(found[0] if found else b"", number)
            for number, found in enumerate(captions.by_pair())
        ]
        return cls(torch.tensor(groups, dtype=torch.int64), data_name(pairs))

    @torch.inference_mode()
    def __call__(self, embedded: Embeddings) -> Rankings:
        """Of each caption the first pair asks, of more than ``_QUERIES`` captions evenly
        spread ones. Equal scores: a right picture stands behind the others."""
        texts, images = embedded.texts, embedded.images
        pairs = torch.tensor(embedded.numbers)
        group = self.groups[pairs]
        asked = _firsts(group)
        asked = asked[:: max(1, -(-len(asked) // _QUERIES))]
        ranks, first = list[int](), list[list[int]]()
        for start in range(0, len(asked), _BLOCK):
            block = asked[start : start + _BLOCK]
            scores = texts[block] @ images.T
            right = group[None] == group[block, None]
            best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            ranks += (((scores >= best) & ~right).sum(1) + 1).tolist()
            found = scores.topk(min(SHOWN, len(images)), dim=1).indices
            first += pairs[found].tolist()
        return Rankings(self.data, pairs[asked].tolist(), ranks, first)


def data_name(pairs: PairDataset) -> str:
    """Short, and equal for equal pairs."""
    return hashlib.sha256(pairs.identity().encode()).hexdigest()[:16]


def _firsts(group: Tensor) -> Tensor:
    """Where each group comes first, in order."""
    _, which = torch.unique(group, return_inverse=True)
    places = torch.full((int(which.max()) + 1,), len(group))
    places = places.scatter_reduce(0, which, torch.arange(len(group)), "amin")
    return places.sort().values


_GAINS, _LOSSES, _OTHERS = 5, 5, 4


@dataclass(frozen=True)
class Case:
    """A query and what came first, by pair number. ``kind`` is why it is shown; a rank is that
    of the first right picture, None where the model was not trained."""

    kind: str
    query: int
    rank_before: int
    rank_after: int | None
    first_before: list[int]
    first_after: list[int]


def choose_cases(before: Rankings, after: Rankings | None) -> list[Case]:
    """The greatest gains and losses, by the ratio of the ranks (from 40 to 2 is more than from
    400 to 300), and some queries spread evenly. Without ``after``: only those."""
    if after and (after.data, after.queries) != (before.data, before.queries):
        after = None
    cases = [_case("", before, after, at) for at in range(len(before.queries))]
    chosen = list[Case]()
    if after:
        ratio = sorted(cases, key=lambda case: case.rank_before / (case.rank_after or 1))
        gains = [c for c in reversed(ratio) if (c.rank_after or 1) < c.rank_before][:_GAINS]
        losses = [c for c in ratio if (c.rank_after or 1) > c.rank_before][:_LOSSES]
        chosen += [*_named("gain", gains), *_named("loss", losses)]
    taken = {case.query for case in chosen}
    rest = [case for case in cases if case.query not in taken]
    some = rest[:: max(1, len(rest) // _OTHERS)][:_OTHERS]
    return [*chosen, *_named("any", some)]


def _case(kind: str, before: Rankings, after: Rankings | None, at: int) -> Case:
    return Case(
        kind,
        before.queries[at],
        before.ranks[at],
        after.ranks[at] if after else None,
        before.first[at],
        after.first[at] if after else [],
    )


def _named(kind: str, cases: Sequence[Case]) -> Iterator[Case]:
    for case in cases:
        yield Case(**{**vars(case), "kind": kind})


@dataclass(frozen=True)
class PairReader:
    """Words and pictures of pairs by number."""

    pairs: PairDataset
    template: CaptionTemplate

    def caption(self, number: int) -> str:
        """The first caption of a pair; "" where it has none."""
        try:
            return self.template.captions(*self.pairs.caption_and_metadata(number))[0]
        except BadCaption:
            return ""

    def picture(self, number: int, at_least: int) -> tuple[str, Image.Image | None]:
        """The pair's place and its picture; None where it cannot be decoded."""
        pair = self.pairs[number]
        try:
            return f"{pair.shard}:{pair.key}", decode_image(pair.image, at_least)
        except BadImage:
            return f"{pair.shard}:{pair.key}", None


def gallery_content(
    cases: Sequence[Case], read: PairReader, keep_picture: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Cases as JSON: each hit with its pair's number, place, caption and whether it is right.

    ``keep_picture`` is told of each pair whose picture is shown, and gives its place.
    """

    def hit(number: int, wanted: str) -> dict[str, Any]:
        caption = read.caption(number)
        return {
            "pair": number,
            "place": keep_picture(number),
            "caption": caption,
            "right": caption == wanted,
        }

    found = []
    for case in cases:
        words = read.caption(case.query)
        found.append(
            {
                "kind": case.kind,
                "query": words,
                "rank_before": case.rank_before,
                "rank_after": case.rank_after,
                "own": hit(case.query, words),
                "before": [hit(number, words) for number in case.first_before],
                "after": [hit(number, words) for number in case.first_after],
            }
        )
    return found
