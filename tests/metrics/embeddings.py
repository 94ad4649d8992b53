"""Embeddings that expose mistakes: random ones, ones with many ties, copies and NaN."""

from collections.abc import Callable

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


def copies(rows: int, seed: int, different: int = 5, dim: int = 96) -> Tensor:
    """Return unit rows of which there are only a few different ones."""
    return unit(different, seed, dim)[torch.arange(rows) % different]


ADVERSARIAL: dict[str, Callable[[int, int], Tensor]] = {
    "random": unit,
    "ties": tied,
    "copies": copies,
    "equal": lambda rows, seed: unit(1, 3).expand(rows, 16).clone(),
    "negative": lambda rows, seed: unit(rows, 0) - 4 * unit(1, 0),
    "opposite": lambda rows, seed: -copies(rows, 0, 7),
    "zero": lambda rows, seed: torch.zeros(rows, 8),
}
"""Name -> function of the number of rows and a seed. Some have cosines below 0 only."""


def naive_ranks(scores: "np.ndarray") -> "np.ndarray":
    """Rank every candidate by a stable sort of falling scores, [Q, C]."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, scores.shape[1] + 1)[None], axis=1)
    return ranks
