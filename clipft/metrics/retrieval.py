"""Embeddings of pairs -> all retrieval figures, with intervals, and what two models differ in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.core.files import finite
from clipft.metrics.bootstrap import CONFIDENCE, interval, resampled
from clipft.metrics.definitions import (
    DIRECTIONS,
    Floats,
    Integers,
    PerQuery,
    ceiling_ranks,
    grouped_figures,
    paired_figures,
)
from clipft.metrics.ranking import ranks_of
from clipft.metrics.relevance import Identities, Relevance, relevance

_MOST_CATEGORIES = 50
_LEAST_PAIRS = 5
"""Of a category that is shown by itself."""


@dataclass(frozen=True)
class EvaluationOptions:
    """``memory`` in bytes bounds the scores held at a time; ``resamples`` 0: no intervals."""

    memory: int
    resamples: int
    seed: int


@dataclass(frozen=True)
class Part:
    """One protocol in one direction: figures, and their values in each resample."""

    queries: int
    candidates: int
    means: dict[str, float]
    draws: dict[str, Floats]
    ceiling: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        figures = {
            name: finite({"value": mean, **self._interval(name)})
            for name, mean in self.means.items()
        }
        shape = {"queries": self.queries, "candidates": self.candidates, "figures": figures}
        return shape | ({"ceiling": self.ceiling} if self.ceiling else {})

    def _interval(self, name: str) -> dict[str, Any]:
        return interval(self.draws[name]) if name in self.draws else {}

    def minus(self, other: "Part") -> dict[str, Any]:
        """By figure: ``value``, ``low``, ``high`` of the difference; ``clear``: 0 is outside."""
        found = {}
        for name, mean in self.means.items():
            difference: dict[str, Any] = {"value": mean - other.means[name]}
            if name in self.draws:
                difference |= interval(self.draws[name] - other.draws[name])
                low, high = difference["low"], difference["high"]
                difference["clear"] = None if low is None else low > 0 or high < 0
            found[name] = finite(difference)
        return found


Parts = dict[str, dict[str, Part]]
"""Protocol -> direction -> part."""


@dataclass(frozen=True)
class Category:
    pairs: int
    parts: Parts


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model on some pairs. ``clusters`` is what the bootstrap draws."""

    pairs: int
    clusters: int
    parts: Parts
    categories: dict[str, Category]
    options: EvaluationOptions

    def recall(self) -> float:
        """Mean of the paired R@1/5/10 of both directions, in 0..1."""
        paired = self.parts["paired"].values()
        return float(np.mean([part.means[f"r@{k}"] for part in paired for k in (1, 5, 10)]))

    def recall_draws(self) -> Floats | None:
        """``recall`` in each resample."""
        paired = self.parts["paired"].values()
        draws = [part.draws.get(f"r@{k}") for part in paired for k in (1, 5, 10)]
        known = [values for values in draws if values is not None]
        return np.mean(known, axis=0) if known else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "pairs": self.pairs,
            "clusters": self.clusters,
            "resamples": self.options.resamples,
            "confidence": CONFIDENCE,
            "recall": self.recall(),
            **_dicts(self.parts),
            "by_category": {
                name: {"pairs": category.pairs, **_dicts(category.parts)}
                for name, category in self.categories.items()
            },
        }


def _dicts(parts: Parts) -> dict[str, Any]:
    return {
        protocol: {direction: part.to_dict() for direction, part in directions.items()}
        for protocol, directions in parts.items()
    }


def difference(after: Evaluation, before: Evaluation) -> dict[str, Any]:
    """``after`` minus ``before``, measured on the same pairs, resample by resample."""

    def of(ours: Parts, theirs: Parts) -> dict[str, Any]:
        return {p: {d: part.minus(theirs[p][d]) for d, part in ours[p].items()} for p in ours}

    shared = after.categories.keys() & before.categories.keys()
    return {
        "recall": recall_difference(after, before),
        **of(after.parts, before.parts),
        "by_category": {
            name: of(category.parts, before.categories[name].parts)
            for name, category in after.categories.items()
            if name in shared
        },
    }


def recall_difference(after: Evaluation, before: Evaluation) -> dict[str, Any]:
    """``value``, ``low``, ``high``, ``clear`` of the difference in mean recall."""
    found: dict[str, Any] = {"value": after.recall() - before.recall()}
    ours, theirs = after.recall_draws(), before.recall_draws()
    if ours is None or theirs is None:
        return found
    around = interval(ours - theirs)
    return {**found, **around, "clear": around["low"] > 0 or around["high"] < 0}


@torch.inference_mode()
def evaluate(
    images: Tensor,
    texts: Tensor,
    identities: Identities,
    labels: Sequence[str | None],
    options: EvaluationOptions,
) -> Evaluation:
    """Unit embeddings float32 [N, D] of N pairs; ``labels`` [N] name their categories."""
    related = relevance(identities)
    samples = _paired(images, texts, related, options) | _grouped(images, texts, related, options)
    sizes = {"paired": (len(images), len(images)), "grouped": _sizes(related)}
    ceilings = _ceilings(identities)
    drawn = _draws(list(samples.values()), options)
    parts: Parts = {}
    for (key, sample), draws in zip(samples.items(), drawn, strict=True):
        protocol, direction = key
        candidates = sizes[protocol][direction == "image_to_text"]
        ceiling = ceilings[direction] if protocol == "paired" else None
        part = Part(len(sample), candidates, _means(sample), draws, ceiling)
        parts.setdefault(protocol, {})[direction] = part
    return Evaluation(
        len(images),
        int(related.clusters.max()) + 1,
        parts,
        _categories(samples, labels, related, parts, options),
        options,
    )


Samples = dict[tuple[str, str], PerQuery]
"""(protocol, direction) -> figures per query."""


def _paired(images: Tensor, texts: Tensor, related: Relevance, o: EvaluationOptions) -> Samples:
    own = torch.arange(len(images))
    sides = {"text_to_image": (texts, images), "image_to_text": (images, texts)}
    return {
        ("paired", direction): PerQuery(
            paired_figures(ranks_of(queries, candidates, own, own, o.memory).numpy()),
            related.clusters,
        )
        for direction, (queries, candidates) in sides.items()
    }


def _grouped(images: Tensor, texts: Tensor, related: Relevance, o: EvaluationOptions) -> Samples:
    texts, images = texts[related.text_pairs], images[related.photo_pairs]
    rows, columns = related.edge_texts, related.edge_photos
    back = np.lexsort((rows, columns))
    sides = {
        "text_to_image": (texts, images, rows, columns, related.text_pairs),
        "image_to_text": (images, texts, columns[back], rows[back], related.photo_pairs),
    }
    samples = {}
    for direction, (queries, candidates, wanted, right, pairs) in sides.items():
        edges = torch.from_numpy(wanted), torch.from_numpy(right)
        ranks = ranks_of(queries, candidates, *edges, o.memory).numpy()
        figures = grouped_figures(wanted, ranks)
        samples["grouped", direction] = PerQuery(figures, related.clusters[pairs])
    return samples


def _sizes(related: Relevance) -> tuple[int, int]:
    """Candidates of the grouped protocol: text to image, image to text."""
    return len(related.photo_pairs), len(related.text_pairs)


def _ceilings(identities: Identities) -> dict[str, dict[str, float]]:
    captions, photos = identities.captions, identities.photos
    ranks = (ceiling_ranks(captions, photos), ceiling_ranks(photos, captions))
    clusters = np.zeros(len(captions), np.int64)
    figures = (_means(PerQuery(paired_figures(best), clusters)) for best in ranks)
    return dict(zip(DIRECTIONS, figures, strict=True))


def _means(sample: PerQuery) -> dict[str, float]:
    means = sample.means()
    if "mean_rank" in sample.figures:
        means["median_rank"] = float(np.median(sample.figures["mean_rank"]))
    return means


def _draws(samples: Sequence[PerQuery], options: EvaluationOptions) -> list[dict[str, Floats]]:
    if not options.resamples:
        return [{} for _ in samples]
    return resampled(samples, options.resamples, options.seed)


def _categories(
    samples: Samples,
    labels: Sequence[str | None],
    related: Relevance,
    whole: Parts,
    options: EvaluationOptions,
) -> dict[str, Category]:
    """The most frequent categories; a text or photo is of its first pair's category."""
    counted = Counter(label for label in labels if label).most_common(_MOST_CATEGORIES)
    of_pair = np.array([label or "" for label in labels])
    of_query = {
        ("paired", "text_to_image"): of_pair,
        ("paired", "image_to_text"): of_pair,
        ("grouped", "text_to_image"): of_pair[related.text_pairs],
        ("grouped", "image_to_text"): of_pair[related.photo_pairs],
    }
    found = {}
    for label, pairs in counted:
        parts: Parts = {}
        for (protocol, direction), sample in samples.items():
            chosen = sample.of(of_query[protocol, direction] == label)
            if len(chosen):
                candidates = whole[protocol][direction].candidates
                parts.setdefault(protocol, {})[direction] = _part(chosen, candidates, options)
        if pairs >= _LEAST_PAIRS and len(parts) == len(whole):
            found[label] = Category(pairs, parts)
    return found


def _part(sample: PerQuery, candidates: int, options: EvaluationOptions) -> Part:
    clusters: Integers = np.unique(sample.clusters, return_inverse=True)[1].astype(np.int64)
    draws = _draws([PerQuery(sample.figures, clusters)], options)[0]
    return Part(len(sample), candidates, _means(sample), draws)
