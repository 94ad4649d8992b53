"""What benchmarks name exists: they are run too rarely to notice that a function has moved."""

from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from tests.benchmarks import p5_startup, run_all


@pytest.mark.parametrize("module, functions", p5_startup.FIRST_WORK.values())
def test_the_functions_at_which_p5_stops_exist(module, functions):
    for name in functions.split(","):
        found = attrgetter(name)(import_module(module))
        # A function that is only imported there would be called by its other name
        assert "." in name or found.__module__ == module


@pytest.mark.parametrize("name", run_all.BENCHMARKS)
def test_each_benchmark_of_run_all_is_a_program(name):
    script = Path(run_all.__file__).parent / run_all.BENCHMARKS[name].split()[0]
    assert '"__main__"' in script.read_text(encoding="utf-8")
