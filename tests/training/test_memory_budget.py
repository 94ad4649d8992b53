"""What the search for a micro-batch promises is what a step keeps, on cards of any size."""

import numpy as np
import pytest
import torch

from clipft.core import memory
from clipft.core.memory import MemoryBudget
from clipft.embedding.towers import Chunk, Tower
from clipft.embedding.transfer import Transfer
from clipft.models.device import Precision
from clipft.training.batch_size import Probe, search
from clipft.training.step.tower_pass import GraphMemory

GIB = 1 << 30
MODELS = {  # bytes of the weights, of those that train, and of the graphs of an image and a text
    "B/32": (0.6e9, 6.6e6, 13.1e6, 5.3e6),
    "L/14": (1.7e9, 14e6, 185e6, 7.9e6),
}


def tower_of(name: str) -> Tower:
    cpu = torch.device("cpu")
    return Tower(
        name, True, lambda batches: None, torch.relu, Precision("bf16", cpu), Transfer(cpu)
    )


class Card:
    """A GPU that holds nothing but a model: its step takes twice the bytes of its graph."""

    def __init__(self, gib: int, model: str) -> None:
        self.weights, self.trainable, self.image, self.text = MODELS[model]
        self.memory = gib * GIB

    def try_size(self, size: int) -> Probe:
        graph = int((self.image + self.text) * size)
        peak = int(self.weights + self.trainable + 2 * graph)
        if peak > self.memory:
            return Probe(size, fits=False)
        return Probe(size, True, size / 400, size / 1200, peak, graph)

    def step_keeps(self, micro: int, pairs: int) -> float:
        """The share of its graphs that a step keeps, by bytes."""
        free = self.memory - self.weights - 3 * self.trainable
        graphs = GraphMemory(lambda: MemoryBudget.of(free, "cuda"))
        graphs.begin_step()
        kept = total = 0.0
        for name, each in (("images", self.image), ("texts", self.text)):
            graphs.bytes_per_cell[name] = each
            keys = np.zeros(micro, np.uint64)
            chunks = [Chunk(torch.empty(0), keys, micro, micro)] * (pairs // micro)
            tower = tower_of(name)
            kept += graphs.kept(tower, chunks) * micro * each
            total += pairs * each
        return kept / total


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gib", [24, 48, 80])
@pytest.mark.parametrize("effective", [256, 1024, 4096])
def test_a_step_keeps_what_the_search_promises(gib, model, processes, effective):
    card, own = Card(gib, model), effective // processes
    found = search(card.try_size, own, int(card.memory - 2 * card.trainable), device_refuses=True)
    assert card.try_size(found.chosen).fits
    micro = 1 << (found.chosen.bit_length() - 1)  # divides the batch
    kept = card.step_keeps(micro, own)
    expected = MemoryBudget.of(card.memory - card.weights - 3 * card.trainable, "cuda").kept(
        micro, own, card.image + card.text
    )
    assert kept == pytest.approx(expected, abs=2 * micro / own)
    if found.chosen == own:
        assert kept == 1.0 and found.kept == 1.0
    elif found.chosen == micro:
        assert kept >= found.kept - 2 * micro / own


def test_processes_share_the_memory_of_a_cpu_and_not_that_of_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    card = torch.device("cuda")
    alone = MemoryBudget.now(card)
    assert alone.free == pytest.approx(11 * GIB * 0.9)  # 1 GiB of what is reserved is in use
    assert MemoryBudget.now(card, sharers=8) == alone
    monkeypatch.setattr(memory, "cgroup_free", lambda root, membership: [])
    cpu = torch.device("cpu")
    assert MemoryBudget.now(cpu, sharers=8).free < 0.2 * MemoryBudget.now(cpu).free


def test_one_graph_of_each_tower_is_always_kept():
    card = Card(80, "L/14")
    card.memory = card.weights
    assert card.step_keeps(64, 256) == 0.25


def test_the_budget_is_taken_before_anything_is_encoded_and_halved_when_memory_runs_out():
    asked = []

    def budget() -> MemoryBudget:
        asked.append(True)
        return MemoryBudget(1000.0, over_graph=1.0)

    graphs = GraphMemory(budget)
    graphs.begin_step()
    assert asked == [True]
    graphs.bytes_per_cell["images"] = 1.0
    chunks = [Chunk(torch.empty(0), np.zeros(1, np.uint64), 100, 100)] * 12
    tower = tower_of("images")
    counts = [graphs.kept(tower, chunks)]
    while graphs.halve():
        graphs.begin_step()
        counts.append(graphs.kept(tower, chunks))
    assert counts == [10, 5, 2, 1] and asked == [True]
