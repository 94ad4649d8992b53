"""What the search for a micro-batch promises is what a step keeps, on cards of any size."""

import numpy as np
import pytest
import torch

from clipft.core import memory
from clipft.core.memory import MemoryBudget
from clipft.embedding.towers import Chunk
from clipft.training.step.tower_pass import GraphMemory
from tests.training.modelled_card import GIB, MODELS, ModelledCard, tower_of


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gib", [24, 48, 80])
@pytest.mark.parametrize("effective", [256, 1024, 4096])
def test_a_step_keeps_what_the_search_promises(gib, model, processes, effective):
    """Or a little more, since a step keeps the graphs of each tower apart; and it fits."""
    card, own = ModelledCard(gib, model), effective // processes
    found = card.search(own)
    assert card.try_size(found.chosen).fits
    kept = card.step_keeps(found.chosen, own)
    assert found.kept <= kept <= found.kept + 2 * found.chosen / own


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
    card = ModelledCard(80, "L/14")
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
