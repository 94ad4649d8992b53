"""Retrieval of another photo of the same product, from image to image."""

import numpy as np
import torch
from torch import Tensor

from clipft.metrics.definitions import PHOTOS, Integers, PerQuery, grouped_figures
from clipft.metrics.ranking import ranks_of
from clipft.metrics.relevance import Identities, Relevance


def photo_figures(
    images: Tensor,
    identities: Identities,
    related: Relevance,
    memory: int,
    pairs: Integers | None = None,
) -> PerQuery | None:
    """Measure whether each distinct image finds the other images of its product.

    Args:
        images: unit embeddings of the pairs' images, float32 [N, D].
        identities: the product of each pair, as its group.
        related: which images are distinct, and the clusters of the pairs.
        memory: limit in bytes of the scores held at a time.
        pairs: int64, the pairs whose images are used as queries; None for all pairs.

    Returns:
        None if products are unknown, or none has several images.
    """
    if identities.groups is None:
        return None
    products = identities.groups[related.image_pairs]
    order = np.argsort(products, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(products[order])) + 1)
    several = [m for m in members if len(m) > 1 and products[m[0]] >= 0]
    if not several:
        return None
    queries = np.concatenate([np.repeat(m, len(m)) for m in several])
    right = np.concatenate([np.tile(m, len(m)) for m in several])
    by_query = np.lexsort((right, queries))
    if pairs is not None:
        by_query = by_query[np.isin(related.image_pairs[queries[by_query]], pairs)]
    queries, right = queries[by_query], right[by_query]
    if not len(queries):
        return None

    distinct = images[related.image_pairs]
    edges = torch.from_numpy(queries), torch.from_numpy(right)
    ranks = ranks_of(distinct, distinct, *edges, memory).numpy()
    # A query is not its own candidate, so all candidates ranked after it move up by one
    itself = queries == right
    asked, numbers = np.unique(queries, return_inverse=True)
    ranks = ranks - (ranks > ranks[itself][numbers])
    figures = grouped_figures(numbers[~itself], ranks[~itself])
    clusters = related.clusters[related.image_pairs[asked]]
    return PerQuery({name: figures[name] for name in PHOTOS}, clusters)
