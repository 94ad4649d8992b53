"""Measure time and peak memory of paired retrieval of random embeddings, in both directions.

Compares clipft, with the default ``evaluation_memory``, with the full matrix of scores and numpy's
argsort, at the largest size whose matrix and order fit into ``--room`` GiB. Then runs clipft alone
at ``--pairs``. Each measurement has its own process. Memory is its peak without the embeddings.

    python tests/benchmarks/retrieval_scale.py [--pairs 200000] [--quick] [--json FILE]
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from side_by_side import arguments, write_figures

from clipft.config.settings import Settings
from clipft.metrics.ranking import partner_ranks

_PEER_BYTES = 16
"""Bytes per score in the peer: the score, its negation for the order, and its index as int64."""


@dataclass(frozen=True)
class Scale:
    """Medians in seconds and MiB, and ``times_faster`` with its spread."""

    pairs: int
    dimensions: int
    ours_s: float
    ours_MiB: float
    peer_s: float | str
    peer_MiB: float | str
    times_faster: str


@dataclass(frozen=True)
class Cost:
    seconds: float
    mebibytes: float
    ranks: int
    """The sum of the ranks, which must be the same for both."""


def embeddings(pairs: int, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(pairs, dimensions, generator=generator)
    texts = images + torch.randn(pairs, dimensions, generator=generator)
    return tuple(torch.nn.functional.normalize(x, dim=1) for x in (images, texts))


def ours(images: torch.Tensor, texts: torch.Tensor) -> int:
    memory = Settings().evaluation_bytes
    return sum(
        int(partner_ranks(q, c, memory).sum()) for q, c in ((texts, images), (images, texts))
    )


def peer(images: torch.Tensor, texts: torch.Tensor) -> int:
    """Rank as in open_clip's ``get_clip_metrics``: all scores, all orders, rank of the match."""
    scores, total = images.numpy() @ texts.numpy().T, 0
    for matrix in (scores, scores.T):
        order = np.argsort(-matrix, axis=1, kind="stable")
        total += int(np.nonzero(order == np.arange(len(matrix))[:, None])[1].sum()) + len(matrix)
    return total


def _child(work: Callable[..., int], pairs: int, dimensions: int, pipe: Any) -> None:
    images, texts = embeddings(pairs, dimensions)
    work(images[:64], texts[:64])  # a warm-up of the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    ranks = work(images, texts)
    seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send(Cost(seconds, grown / 1024, ranks))


def measure(work: Callable[..., int], pairs: int, dimensions: int) -> Cost:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_child, args=(work, pairs, dimensions, sender))
    process.start()
    sender.close()
    cost: Cost = receiver.recv()
    process.join()
    return cost


def side_by_side(pairs: int, dimensions: int, repeats: int) -> Scale:
    mine, theirs = [], []
    for _ in range(repeats):
        mine.append(measure(ours, pairs, dimensions))
        theirs.append(measure(peer, pairs, dimensions))
        assert abs(mine[-1].ranks - theirs[-1].ranks) <= 1e-6 * theirs[-1].ranks
    ratios = sorted(b.seconds / a.seconds for a, b in zip(mine, theirs, strict=True))
    a, b = (
        Cost(
            statistics.median(c.seconds for c in costs),
            statistics.median(c.mebibytes for c in costs),
            0,
        )
        for costs in (mine, theirs)
    )
    ratio = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}..{ratios[-1]:.2f})"
    return Scale(pairs, dimensions, a.seconds, a.mebibytes, b.seconds, b.mebibytes, ratio)


def alone(pairs: int, dimensions: int) -> Scale:
    cost = measure(ours, pairs, dimensions)
    needed = f"would take {_PEER_BYTES * pairs**2 >> 20:,}"
    return Scale(pairs, dimensions, cost.seconds, cost.mebibytes, "-", needed, "-")


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--room", type=float, default=4, help="GiB for the peer")
    return parser.parse_args()


def main() -> None:
    wish = chosen()
    room, pairs = (0.5, 20_000) if wish.quick else (wish.room, wish.pairs)
    fits = int((room * 2**30 / _PEER_BYTES) ** 0.5) // 1000 * 1000
    rows = [side_by_side(fits, wish.dimensions, 3), alone(pairs, wish.dimensions)]
    for row in rows:
        print(row)
    if wish.json:
        write_figures(wish.json, "retrieval at scale", rows, ("torch", "numpy"))


if __name__ == "__main__":
    main()
