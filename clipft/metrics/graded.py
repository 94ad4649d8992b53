"""nDCG by grades, with which the data say how relevant an image is to a text."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipft.metrics.definitions import Floats, Integers, PerQuery
from clipft.metrics.ranking import ranks_of
from clipft.metrics.relevance import Identities, Relevance, distinct

_FIRST = 10


def graded_figures(
    images: Tensor,
    texts: Tensor,
    identities: Identities,
    related: Relevance,
    memory: int,
    pairs: Integers | None = None,
) -> dict[str, PerQuery]:
    """Measure nDCG@10 of each distinct text and image that has a right candidate.

    A pair gives its grade to its captions and its image. Where several pairs have the same caption
    and image, the highest grade counts.

    Args:
        images: unit embeddings of the pairs' images, float32 [N, D].
        texts: unit embeddings of their captions, float32 [T, D].
        identities: the grade of each pair, and which captions and images are equal.
        related: the distinct texts and images, and the clusters of the pairs.
        memory: limit in bytes of the scores held at a time.
        pairs: int64, the pairs whose captions and images are used as queries; None for all
            pairs.

    Returns:
        By direction; empty without a grade above 0.
    """
    if identities.grades is None:
        return {}
    owners = identities.owners
    of_text, of_image = distinct(identities.captions)[1], distinct(identities.images)[1][owners]
    edges, which = np.unique(np.stack([of_text, of_image]), axis=1, return_inverse=True)
    gains = np.zeros(edges.shape[1])
    np.maximum.at(gains, which.ravel(), identities.grades[owners])
    kept = gains > 0
    of_texts = of_images = kept
    if pairs is not None:
        of_texts = kept & np.isin(related.text_pairs[edges[0]], pairs)
        of_images = kept & np.isin(related.image_pairs[edges[1]], pairs)
    if not (of_texts.any() and of_images.any()):
        return {}
    by_text = _Graded(edges[0, of_texts], edges[1, of_texts], gains[of_texts])
    by_image = _Graded(edges[1, of_images], edges[0, of_images], gains[of_images])
    rows, columns = texts[related.text_rows], images[related.image_pairs]
    clusters = related.clusters
    return {
        "text_to_image": by_text.ndcg(rows, columns, clusters[related.text_pairs], memory),
        "image_to_text": by_image.ndcg(columns, rows, clusters[related.image_pairs], memory),
    }


@dataclass(frozen=True)
class _Graded:
    """Right candidates with their gains: ``candidates[e]`` for ``queries[e]``, int64 [E] each, with
    ``gains``, float64 [E], above 0."""

    queries: Integers
    candidates: Integers
    gains: Floats

    def ndcg(
        self, queries: Tensor, candidates: Tensor, clusters: Integers, memory: int
    ) -> PerQuery:
        """The gain is the grade itself, as in Jarvelin & Kekalainen 2002; the discount is
        log2(rank + 1). ``clusters`` are those of all queries, int64."""
        order = np.lexsort((-self.gains, self.queries))  # the ideal ranking of each query
        wanted, gains = self.queries[order], self.gains[order]
        edges = torch.from_numpy(wanted), torch.from_numpy(self.candidates[order])
        ranks = ranks_of(queries, candidates, *edges, memory).numpy()
        asked, starts, counts = np.unique(wanted, return_index=True, return_counts=True)
        ideal = np.arange(len(wanted)) - np.repeat(starts, counts) + 1

        def dcg(places: Integers) -> Floats:
            counted = np.where(places <= _FIRST, gains / np.log2(places + 1), 0.0)
            total: Floats = np.add.reduceat(counted, starts)
            return total

        return PerQuery({"ndcg@10": dcg(ranks) / dcg(ideal)}, clusters[asked])
