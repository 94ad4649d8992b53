"""The rankings that a run stores, and the cases from them in the gallery of the report.

``evaluation.rankings`` makes the rankings while a run has the embeddings. This module does not
import torch, so that a report is written quickly.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipft.core.files import read_json, write_json
from clipft.data.captions.template import BadCaption, CaptionTemplate
from clipft.data.images.decode import decode_image
from clipft.data.images.formats import BadImage
from clipft.data.shards.dataset import PairDataset

SHOWN = 5
"""Images kept for each query."""
_GAINS, _LOSSES, _MISSES, _OTHERS = 5, 5, 4, 4
_MOST_IMAGES = 240
"""The most different images of the queries that a reader can look up in a page."""


@dataclass(frozen=True)
class Rankings:
    """The images that a model ranks first for each query.

    ``queries`` are pair numbers. ``ranks`` holds the rank of each query's first right image,
    counted from 1, and ``first`` the pair numbers of its first ``SHOWN`` images. ``data`` is the
    ``data_name`` of the pairs.
    """

    data: str
    queries: list[int]
    ranks: list[int]
    first: list[list[int]]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Rankings | None":
        """Read rankings; None if the file does not exist or has other content."""
        try:
            return cls(**(read_json(path) or {}))
        except TypeError:
            return None


def data_name(pairs: PairDataset) -> str:
    """Return a short name that is equal for equal pairs."""
    return hashlib.sha256(pairs.identity().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """A query and the pair numbers of the images that were ranked first.

    ``kind`` is the reason to show it: ``gain``, ``loss``, ``miss`` or ``any``. The ranks are those
    of the first right image; ``rank_after`` is None if there is no fine-tuned model.
    """

    kind: str
    query: int
    rank_before: int
    rank_after: int | None
    first_before: list[int]
    first_after: list[int]


def choose_cases(before: Rankings, after: Rankings | None) -> list[Case]:
    """Choose the greatest gains and losses, queries that both models miss, and some others.

    Gains are compared by the ratio of the ranks: from 40 to 2 is more than from 400 to 300. In a
    miss, neither model has a right image among the first. The others are spread evenly. If
    ``after`` has no rankings of the same queries, there are only others.
    """
    cases = all_cases(before, after)
    compared = [case for case in cases if case.rank_after]
    ratio = sorted(compared, key=lambda case: case.rank_before / (case.rank_after or 1))
    gains = [c for c in reversed(ratio) if (c.rank_after or 1) < c.rank_before][:_GAINS]
    losses = [c for c in ratio if (c.rank_after or 1) > c.rank_before][:_LOSSES]
    taken = {case.query for case in (*gains, *losses)}
    missed = sorted(
        (c for c in compared if min(c.rank_before, c.rank_after or 1) > SHOWN),
        key=lambda case: -(case.rank_after or 1),
    )
    misses = [case for case in missed if case.query not in taken][:_MISSES]
    taken |= {case.query for case in misses}
    rest = [case for case in cases if case.query not in taken]
    return [
        *(replace(case, kind="gain") for case in gains),
        *(replace(case, kind="loss") for case in losses),
        *(replace(case, kind="miss") for case in misses),
        *rest[:: max(1, len(rest) // _OTHERS)][:_OTHERS],
    ]


def all_cases(before: Rankings, after: Rankings | None) -> list[Case]:
    """Return a case for every query; of one model if ``after`` does not have the same queries."""
    if after and (after.data, after.queries) != (before.data, before.queries):
        after = None
    return [
        Case(
            "any",
            query,
            before.ranks[at],
            after.ranks[at] if after else None,
            before.first[at],
            after.first[at] if after else [],
        )
        for at, query in enumerate(before.queries)
    ]


def choose_to_look_up(cases: Sequence[Case]) -> list[Case]:
    """Choose the queries that a reader can look up in a page: random queries that
    together show at most ``_MOST_IMAGES`` different images."""
    chosen, shown = list[int](), set[int]()
    for at in np.random.default_rng(0).permutation(len(cases)).tolist():
        images = shown | {*cases[at].first_before, *cases[at].first_after}
        if len(images) <= _MOST_IMAGES:
            chosen.append(at)
            shown = images
    return [cases[at] for at in sorted(chosen)]


def mistaken_categories(
    cases: Sequence[Case], labels: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Count how often the first image of a query of one category is from another category.

    ``labels`` are those of all pairs, None without a category. The most frequent confusions of the
    fine-tuned model, or of the pretrained model if there is no other, come first.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    asked = Counter(labels[case.query] for case in cases)
    for case in cases:
        for model, first in enumerate((case.first_before, case.first_after)):
            wanted, found = labels[case.query], labels[first[0]] if first else None
            if wanted and found and wanted != found:
                counts.setdefault((wanted, found), [0, 0])[model] += 1
    fine_tuned = any(case.first_after for case in cases)
    return [
        {
            "category": wanted,
            "taken_for": found,
            "queries": asked[wanted],
            "before": before,
            "after": after if fine_tuned else None,
        }
        for (wanted, found), (before, after) in sorted(
            counts.items(), key=lambda item: (-item[1][fine_tuned], -item[1][0], item[0])
        )
    ]


@dataclass(frozen=True)
class PairReader:
    """Reads captions and images of pairs by number."""

    pairs: PairDataset
    template: CaptionTemplate

    def captions(self, number: int) -> list[str]:
        """Return the captions of a pair, or [""] if it has none."""
        try:
            return self.template.captions(*self.pairs.caption_and_metadata(number))
        except BadCaption:
            return [""]

    def image(self, number: int, at_least: int) -> tuple[str, Image.Image | None]:
        """Return a pair's place and its image; the image is None if it cannot be decoded.

        The image may be decoded at a smaller size, but not below ``at_least`` pixels.
        """
        pair = self.pairs[number]
        try:
            return f"{pair.shard}:{pair.key}", decode_image(pair.image, at_least)
        except BadImage:
            return f"{pair.shard}:{pair.key}", None


def gallery_content(
    cases: Sequence[Case], read: PairReader, keep_image: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Return cases as JSON, and for each hit its pair, place, caption and whether it is right.

    ``keep_image`` is called with the number of each pair whose image is shown, and returns the
    pair's place.
    """

    def hit(number: int, wanted: str) -> dict[str, Any]:
        captions = read.captions(number)
        right = wanted in captions
        return {
            "pair": number,
            "place": keep_image(number),
            "caption": wanted if right else captions[0],
            "right": right,
        }

    found = []
    for case in cases:
        words = read.captions(case.query)[0]
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


def lookup_content(
    cases: Sequence[Case], read: PairReader, keep_image: Callable[[int], str]
) -> dict[str, Any]:
    """Return queries to look up, as JSON: ``queries`` have the pair numbers of their images, and
    ``pairs`` the caption and place of each number."""
    pairs = dict[int, dict[str, str]]()
    for case in cases:
        for number in (case.query, *case.first_before, *case.first_after):
            if number not in pairs:
                pairs[number] = {"caption": read.captions(number)[0], "place": ""}
        for number in (*case.first_before, *case.first_after):
            pairs[number]["place"] = keep_image(number)
    return {
        "pairs": pairs,
        "queries": [
            {
                "pair": case.query,
                "rank_before": case.rank_before,
                "rank_after": case.rank_after,
                "before": case.first_before,
                "after": case.first_after,
            }
            for case in cases
        ],
    }
