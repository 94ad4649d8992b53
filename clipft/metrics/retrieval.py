"""All retrieval figures of a model's embeddings, with intervals, and how two models differ."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipft.core.files import finite
from clipft.metrics.bootstrap import CONFIDENCE, interval, resampled
from clipft.metrics.comparisons import paired_difference
from clipft.metrics.definitions import (
    Floats,
    Integers,
    PerQuery,
    grouped_figures,
    paired_figures,
    upper_bound_ranks,
)
from clipft.metrics.figures import RECALLS, mean_recall
from clipft.metrics.graded import graded_figures
from clipft.metrics.photos import photo_figures
from clipft.metrics.ranking import (
    Retrieval,
    drawn_queries,
    paired_ranks,
    ranks_of,
    retrieval,
    retrieval_of_ranks,
)
from clipft.metrics.relevance import Identities, Relevance, relevance

_MOST_CATEGORIES = 50
_MIN_PAIRS = 5
"""Smaller categories get no figures of their own."""


@dataclass(frozen=True)
class EvaluationOptions:
    """``memory`` limits the bytes of scores held at a time; ``resamples`` 0 means no intervals.

    Embeddings are also measured when truncated to each number of ``dimensions``. At most
    ``queries`` pairs are used as queries (0: all).
    """

    memory: int
    resamples: int
    seed: int
    dimensions: tuple[int, ...] = ()
    queries: int = 0


@dataclass(frozen=True)
class Part:
    """The figures of one protocol in one direction.

    ``resampled`` maps the name of a figure to its value in each resample, float64 [resamples];
    it is empty without resamples. ``upper_bound`` is the best that can be reached with the
    duplicates in the data, for the paired protocol.
    """

    queries: int
    candidates: int
    means: dict[str, float]
    resampled: dict[str, Floats]
    upper_bound: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; ``low`` and ``high`` are given where a figure was resampled."""
        figures = {}
        for name, mean in self.means.items():
            around = interval(self.resampled[name]) if name in self.resampled else {}
            figures[name] = finite({"value": mean, **around})
        shape = {"queries": self.queries, "candidates": self.candidates, "figures": figures}
        return shape | ({"ceiling": self.upper_bound} if self.upper_bound else {})

    def minus(self, other: "Part") -> dict[str, Any]:
        """Return the difference of each figure: ``value``, ``low``, ``high`` and ``clear``.

        ``clear`` is True if the interval does not include 0.
        """
        found = {}
        for name, mean in self.means.items():
            change = mean - other.means[name]
            difference: dict[str, Any] = {"value": change}
            if name in self.resampled:
                ours, theirs = self.resampled[name], other.resampled[name]
                difference = paired_difference(change, ours, theirs)
            found[name] = finite(difference)
        return found


Parts = dict[str, dict[str, Part]]
"""Protocol -> direction -> part."""


@dataclass(frozen=True)
class Category:
    """The figures of the queries of one category, against all candidates."""

    pairs: int
    parts: Parts


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model on some pairs.

    ``clusters`` is the number of clusters that are resampled, and ``queries`` the number of pairs
    whose captions and images are queries. Each of the ``captions`` belongs to one of the pairs.
    ``retrieval`` is the short form of the paired figures, as measured after each epoch, and
    ``by_dimensions`` the same for embeddings truncated to that many dimensions.
    """

    pairs: int
    captions: int
    clusters: int
    queries: int
    parts: Parts
    categories: dict[str, Category]
    options: EvaluationOptions
    retrieval: Retrieval
    by_dimensions: dict[int, Retrieval] = field(default_factory=dict)

    def recall(self) -> float:
        """Return the mean of paired R@1, R@5 and R@10 of both directions, in 0..1."""
        paired = self.parts["paired"].values()
        return float(np.mean([part.means[name] for part in paired for name in RECALLS]))

    def resampled_recall(self) -> Floats:
        """Return ``recall`` in each resample, float64 [resamples]; there must be some."""
        paired = self.parts["paired"].values()
        found: Floats = np.mean([p.resampled[name] for p in paired for name in RECALLS], axis=0)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values of ``before`` and ``after`` in evaluation.json."""
        return {
            "pairs": self.pairs,
            "captions": self.captions,
            "clusters": self.clusters,
            "queries": self.queries,
            "resamples": self.options.resamples,
            "confidence": CONFIDENCE,
            "recall": self.recall(),
            **_to_dicts(self.parts),
            "by_category": {
                name: {"pairs": category.pairs, **_to_dicts(category.parts)}
                for name, category in self.categories.items()
            },
            "by_dimensions": {
                str(size): {"recall": mean_recall(found.to_dict()), **found.to_dict()}
                for size, found in self.by_dimensions.items()
            },
        }


def _to_dicts(parts: Parts) -> dict[str, Any]:
    return {p: {d: part.to_dict() for d, part in parts[p].items()} for p in parts}


def difference(after: Evaluation, before: Evaluation) -> dict[str, Any]:
    """Subtract ``before`` from ``after``, resample by resample.

    Both must be measured on the same pairs with the same options. Returns JSON values shaped as
    in ``Evaluation.to_dict``.
    """

    def subtract(ours: Parts, theirs: Parts) -> dict[str, Any]:
        return {p: {d: part.minus(theirs[p][d]) for d, part in ours[p].items()} for p in ours}

    return {
        "recall": recall_difference(after, before),
        **subtract(after.parts, before.parts),
        "by_category": {
            name: subtract(category.parts, before.categories[name].parts)
            for name, category in after.categories.items()
            if name in before.categories
        },
    }


def recall_difference(after: Evaluation, before: Evaluation) -> dict[str, Any]:
    """Return ``value``, ``low``, ``high`` and ``clear`` of the difference in mean recall."""
    change = after.recall() - before.recall()
    if not (after.options.resamples and before.options.resamples):
        return {"value": change}
    return paired_difference(change, after.resampled_recall(), before.resampled_recall())


@torch.inference_mode()
def evaluate(
    images: Tensor,
    texts: Tensor,
    identities: Identities,
    labels: Sequence[str | None],
    options: EvaluationOptions,
) -> Evaluation:
    """Measure paired and grouped retrieval in both directions, overall and by category; and
    retrieval of other photos of a product, where groups have several; and by grades, if there are
    any.

    Args:
        images: unit embeddings of the pairs' images, float32 [N, D].
        texts: unit embeddings of their captions, float32 [T, D].
        identities: which captions, images and groups are equal, and the pair of each caption.
        labels: the category of each pair, None where it has none.
        options: memory, resamples and seed.

    Raises:
        UsageError: the groups are too large (see ``relevance``).
    """
    related = relevance(identities)
    asked = drawn_queries(len(images), options.queries, options.seed)
    samples, pair_of = _measure(images, texts, identities.owners, related, asked, options.memory)
    photos = photo_figures(images, identities, related, options.memory, asked.numpy())
    if photos:
        samples["photos", "image_to_image"] = photos
    for direction, graded in graded_figures(
        images, texts, identities, related, options.memory, asked.numpy()
    ).items():
        samples["graded", direction] = graded
    samples, clusters = _numbered_from_0(samples)
    candidates = {
        ("paired", "text_to_image"): len(images),
        ("paired", "image_to_text"): len(texts),
        ("grouped", "text_to_image"): len(related.image_pairs),
        ("grouped", "image_to_text"): len(related.text_pairs),
        ("photos", "image_to_image"): len(related.image_pairs) - 1,
        ("graded", "text_to_image"): len(related.image_pairs),
        ("graded", "image_to_text"): len(related.text_pairs),
    }
    best = upper_bound_ranks(identities.captions, identities.images, identities.owners)
    upper_bounds = {
        ("paired", direction): PerQuery(paired_figures(ranks), np.zeros_like(ranks)).means()
        for direction, ranks in zip(("text_to_image", "image_to_text"), best, strict=True)
    }
    values = resampled(list(samples.values()), options.resamples, options.seed)
    parts: Parts = {}
    for (key, sample), own in zip(samples.items(), values, strict=True):
        protocol, direction = key
        size, bound = len(sample.clusters), upper_bounds.get(key)
        part = Part(size, candidates[key], sample.means(), own, bound)
        parts.setdefault(protocol, {})[direction] = part
    categories = _by_category(samples, candidates, labels, pair_of, options)
    to_image, to_text = (
        torch.from_numpy(samples["paired", direction].figures["mean_rank"])
        for direction in ("text_to_image", "image_to_text")
    )
    short = retrieval_of_ranks(to_image, to_text, len(images))
    by_dimensions = {}
    for size in (images.shape[1], *options.dimensions) if options.dimensions else ():
        cut_images, cut_texts = (normalize(rows[:, :size], dim=1) for rows in (images, texts))
        owners = torch.from_numpy(identities.owners)
        by_dimensions[size] = retrieval(cut_images, cut_texts, options.memory, owners, asked)
    sizes = len(images), len(texts), clusters, len(asked)
    return Evaluation(*sizes, parts, categories, options, short, by_dimensions)


Samples = dict[tuple[str, str], PerQuery]
"""(protocol, direction) -> figures per query."""


def _measure(
    images: Tensor,
    texts: Tensor,
    owners: Integers,
    related: Relevance,
    asked: Tensor,
    memory: int,
) -> tuple[Samples, dict[tuple[str, str], Integers]]:
    """Rank the right candidates of every query, by both protocols in both directions.

    Also return the pair of each query.
    """
    samples, clusters, own = Samples(), related.clusters, asked.numpy()
    to_image, to_text = paired_ranks(images, texts, torch.from_numpy(owners), memory, asked)
    pair_of = {
        ("paired", "text_to_image"): owners[np.isin(owners, own)],
        ("paired", "image_to_text"): own,
    }
    for direction, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        pairs = pair_of["paired", direction]
        samples["paired", direction] = PerQuery(paired_figures(ranks.numpy()), clusters[pairs])
    distinct_texts, distinct_images = texts[related.text_rows], images[related.image_pairs]
    by_text = (related.edge_texts, related.edge_images)
    order = np.lexsort(by_text)  # by image, then by text
    by_image = (related.edge_images[order], related.edge_texts[order])
    for direction, queries, candidates, (wanted, right), pairs in (
        ("text_to_image", distinct_texts, distinct_images, by_text, related.text_pairs),
        ("image_to_text", distinct_images, distinct_texts, by_image, related.image_pairs),
    ):
        kept = np.isin(pairs[wanted], own)
        wanted, right = wanted[kept], right[kept]
        edges = torch.from_numpy(wanted), torch.from_numpy(right)
        ranks_found = ranks_of(queries, candidates, *edges, memory).numpy()
        rows, numbers = np.unique(wanted, return_inverse=True)
        figures = grouped_figures(numbers, ranks_found)
        samples["grouped", direction] = PerQuery(figures, clusters[pairs[rows]])
        pair_of["grouped", direction] = pairs[rows]
    return samples, pair_of


def _numbered_from_0(samples: Samples) -> tuple[Samples, int]:
    """Number the clusters that have queries from 0; also return how many there are."""
    known = np.unique(np.concatenate([sample.clusters for sample in samples.values()]))
    return {
        key: PerQuery(sample.figures, np.searchsorted(known, sample.clusters))
        for key, sample in samples.items()
    }, len(known)


def _by_category(
    samples: Samples,
    candidates: dict[tuple[str, str], int],
    labels: Sequence[str | None],
    pair_of: dict[tuple[str, str], Integers],
    options: EvaluationOptions,
) -> dict[str, Category]:
    """Measure the most frequent categories. A text or image takes its first pair's category."""
    of_pair = np.array([label or "" for label in labels])
    of_query = {key: of_pair[pairs] for key, pairs in pair_of.items()}
    found = {}
    for label, pairs in Counter(label for label in labels if label).most_common(_MOST_CATEGORIES):
        chosen = {key: own == label for key, own in of_query.items()}
        if pairs < _MIN_PAIRS or not all(queries.any() for queries in chosen.values()):
            continue
        parts: Parts = {}
        for (protocol, direction), queries in chosen.items():
            sample = samples[protocol, direction]
            figures = {name: values[queries] for name, values in sample.figures.items()}
            # The bootstrap wants the clusters of this category numbered from 0
            numbers = np.unique(sample.clusters[queries], return_inverse=True)[1]
            own = PerQuery(figures, numbers.astype(np.int64))
            values = resampled([own], options.resamples, options.seed)[0]
            size = candidates[protocol, direction]
            part = Part(len(own.clusters), size, own.means(), values)
            parts.setdefault(protocol, {})[direction] = part
        found[label] = Category(pairs, parts)
    return found
