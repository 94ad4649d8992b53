"""Rankings before and after training -> the queries worth looking at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from clipft.data.captions.template import CaptionTemplate
from clipft.data.captions import BadCaption
from clipft.data.images import BadImage, decode_image
from clipft.data.shards.dataset import PairDataset
from clipft.evaluation.gallery import Rankings

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
            return self.template.captions(*self.pairs.words(number))[0]
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
