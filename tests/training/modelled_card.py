"""A GPU by its numbers: the true search and step, fed with the bytes that they would meet."""

import numpy as np
import torch

from clipft.core.memory import MemoryBudget
from clipft.embedding.towers import Chunk, Tower
from clipft.embedding.transfer import Transfer
from clipft.models.device import Precision
from clipft.training.finder.batch_size import Probe, SearchResult, search
from clipft.training.step.tower_pass import GraphMemory

GIB = 1 << 30
MODELS = {
    # Bytes of the weights, of those that train, and of the graphs of an image and a text; seconds
    # of a pair
    "B/32": (0.6e9, 6.6e6, 13.1e6, 5.3e6, 1 / 9000),
    "L/14": (1.7e9, 14e6, 185e6, 7.9e6, 1 / 700),
}
LAUNCHES = 0.02
"""Seconds that a step takes at least, however few its pairs."""


def tower_of(name: str) -> Tower:
    cpu = torch.device("cpu")
    return Tower(
        name, True, lambda batches: None, torch.relu, Precision("bf16", cpu), Transfer(cpu)
    )


class ModelledCard:
    """A GPU that holds nothing but a model: its step takes twice the bytes of its graph."""

    def __init__(self, gib: int, model: str) -> None:
        self.weights, self.trainable, self.image, self.text, self.seconds = MODELS[model]
        self.memory = gib * GIB

    def try_size(self, size: int) -> Probe:
        graph = self.image + self.text
        peak = int(self.weights + self.trainable + 2 * graph * size)
        if peak > self.memory:
            return Probe(size, fits=False)
        seconds = max(LAUNCHES, self.seconds * size)
        return Probe(size, True, seconds, seconds / 3, peak, graph)

    def step_keeps(self, micro: int, pairs: int) -> float:
        """The share of its graphs that a step keeps, by bytes.

        Raises:
            MemoryError: they do not fit beside the backward pass of one more chunk.
        """
        free = self.memory - self.weights - 3 * self.trainable
        graphs = GraphMemory(lambda: MemoryBudget.of(free, "cuda"))
        graphs.begin_step()
        sizes = [min(micro, pairs - first) for first in range(0, pairs, micro)]
        kept, total, least = 0.0, 0.0, sizes[0] * (self.image + self.text)
        for name, each in (("images", self.image), ("texts", self.text)):
            graphs.bytes_per_cell[name] = each
            chunks = [Chunk(torch.empty(0), np.zeros(n, np.uint64), n, n) for n in sizes]
            kept += sum(sizes[: graphs.kept(tower_of(name), chunks)]) * each
            total += pairs * each
        if kept + sizes[0] * max(self.image, self.text) > max(free, 0.0) and kept > least:
            raise MemoryError
        return kept / total

    def search(self, pairs: int) -> SearchResult:
        """The search for the micro-batch of so many pairs."""
        usable = int(self.memory - 2 * self.trainable)
        return search(self.try_size, pairs, usable, device_refuses=True)
