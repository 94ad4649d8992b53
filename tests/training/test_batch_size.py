import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.embedding.load import load_model
from clipft.training.finder.batch_size import (
    MAX_PROBES,
    Probe,
    SearchResult,
    cached_result,
    keep_result,
    result_cache,
    search,
)
from clipft.training.finder.probe import ModelProbe


class Machine:
    """Memory ``fixed + size * each``; a pass takes ``overhead + size * per_pair`` seconds."""

    def __init__(self, memory, each, fixed=100, overhead=0.0, per_pair=1.0):
        self.memory, self.each, self.fixed = memory, each, fixed
        self.overhead, self.per_pair = overhead, per_pair
        self.tried = []

    def __call__(self, size: int) -> Probe:
        self.tried.append(size)
        used = self.fixed + size * self.each
        if used > self.memory:
            return Probe(size, fits=False)
        seconds = self.overhead + size * self.per_pair
        graph = size * self.each // 2  # a backward pass takes twice the graph
        return Probe(size, True, seconds, seconds / 3, used, graph)

    @property
    def largest(self) -> int:
        return (self.memory - self.fixed) // self.each


@given(largest=st.integers(1, 5000), effective=st.integers(2, 4096))
def test_a_gpu_is_searched_to_within_5_percent_in_ten_probes(largest, effective):
    machine = Machine(memory=100 + largest * 10, each=10, overhead=1.0)
    found = search(machine, effective, machine.memory, device_refuses=True)
    true = min(largest, effective)
    assert found.largest <= true
    if largest >= 8:
        assert found.largest >= true * 0.95 - 1
    assert len(machine.tried) <= MAX_PROBES


@given(largest=st.integers(20, 5000), effective=st.integers(2, 4096))
def test_a_cpu_never_tries_what_its_memory_may_not_hold(largest, effective):
    machine = Machine(memory=100 + largest * 10, each=10, overhead=3.0)
    found = search(machine, effective, machine.memory, device_refuses=False)
    assert all(100 + size * 10 <= machine.memory for size in machine.tried)
    assert found.chosen <= max(found.largest, 1)
    assert 100 + found.largest * 10 <= machine.memory


def test_where_all_graphs_can_be_kept_a_small_micro_batch_costs_no_second_pass():
    machine = Machine(memory=10**6, each=10, overhead=0.01)
    found = search(machine, 128, machine.memory, device_refuses=False)
    assert found.kept == 1.0
    assert found.chosen < 128  # as fast, and leaves memory
    assert found.left_bytes == machine.memory - (100 + 10 * found.chosen)


def test_where_few_can_be_kept_the_whole_batch_at_once_saves_a_forward_pass():
    machine = Machine(memory=100 + 150 * 10, each=10, overhead=1.0)
    smaller = search(machine, 512, machine.memory, device_refuses=True)
    assert smaller.kept < 1.0
    found = search(machine, 128, machine.memory, device_refuses=True)
    assert found.kept == 1.0
    assert found.chosen == 128


def test_the_size_taken_leaves_memory_for_what_else_a_run_holds():
    machine = Machine(memory=100 + 200 * 10, each=10, overhead=1.0)
    found = search(machine, 4096, machine.memory, device_refuses=True)
    assert found.largest >= 190
    assert found.left_bytes >= machine.memory * 0.1


@given(largest=st.integers(20, 3000), effective=st.integers(8, 4096))
def test_a_cpu_is_searched_to_within_5_percent_too(largest, effective):
    machine = Machine(memory=100 + largest * 10, each=10, overhead=0.0, per_pair=1e-3)
    found = search(machine, effective, machine.memory, device_refuses=False)
    assert found.largest >= min(largest, effective) * 0.95 - 1
    assert len(machine.tried) <= MAX_PROBES


def test_a_cpu_is_not_kept_busy_for_minutes_only_to_know_the_largest():
    slow = Machine(memory=100 + 2000 * 10, each=10, per_pair=1.0)
    found = search(slow, 4096, slow.memory, device_refuses=False)
    assert max(slow.tried) <= 100
    assert found.extrapolated and 1900 <= found.largest <= 2000


def test_a_size_that_is_slower_is_not_chosen_for_being_larger():
    class Thrashing(Machine):
        def __call__(self, size):
            probe = super().__call__(size)
            slow = 10.0 if size > 16 else 1.0
            return Probe(size, True, probe.step_seconds * slow, probe.forward_seconds, 1)

    assert search(Thrashing(10**6, 10, overhead=1.0), 1024, 10**6, device_refuses=True).chosen <= 16


def test_nothing_fits():
    assert search(Machine(memory=50, each=10), 64, 50, device_refuses=True).chosen == 1


def test_the_cache_keeps_and_survives_rubbish(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFT_CACHE", str(tmp_path))
    found = SearchResult(8, 16, False, 100, (Probe(8, True, 1.0, 0.5, 90),))
    keep_result("a", found)
    keep_result("b", found)
    assert cached_result("a") == found
    assert cached_result("c") is None
    result_cache().write_text("rubbish")
    assert cached_result("a") is None


@pytest.mark.parametrize("effective", [2, 3, 5])
def test_small_effective_batches(effective):
    machine = Machine(memory=10**6, each=10, overhead=1.0)
    assert search(machine, effective, 10**6, device_refuses=False).chosen <= effective


@pytest.mark.parametrize("scenario", ["dual_lora", "linear_probe", "full"])
def test_real_passes_of_a_scenario_leave_nothing_behind(scenario):
    settings = load_settings({"model": "tiny", "scenario": scenario, "device": "cpu"}, environ={})
    loaded = load_model(settings.values)
    tried = ModelProbe.of(loaded, settings.values)(4)
    assert tried.fits and tried.peak_bytes > 0
    assert tried.step_seconds > tried.forward_seconds > 0
    assert all(parameter.grad is None for _, parameter in loaded.model.trainable())


def test_a_size_that_memory_refuses_does_not_fit():
    settings = load_settings({"model": "tiny", "device": "cpu"}, environ={}).values
    probe = ModelProbe.of(load_model(settings), settings)
    assert not probe(1 << 40).fits


def test_the_command_finds_for_the_scenario_and_says_what_is_left(capsys):
    args = ["--model", "tiny", "--effective-batch-size", "8", "--device", "cpu", "--json"]
    assert run(["find-batch-size", *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batch_size"] in (4, 8) and found["left_bytes"] > 0
