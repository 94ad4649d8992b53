"""Embeddings that expose mistakes: random ones and ones with many ties."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PLENTY = 1 << 28


def unit(rows: int, seed: int, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def tied(rows: int, seed: int, values: int = 3) -> Tensor:
    """Return small whole numbers: their dot products are exact, often equal, some negative."""
    drawn = np.random.default_rng(seed).integers(-values, values + 1, (rows, 3))
    return torch.from_numpy(drawn).float()


def naive_ranks(scores: "np.ndarray") -> "np.ndarray":
    """Rank every candidate by a stable sort of falling scores, [Q, C]."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, scores.shape[1] + 1)[None], axis=1)
    return ranks
