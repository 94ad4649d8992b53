"""The benchmarks about GPUs run, on a machine without one, so that they do when there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def figures(name: str, *args: str, file: Path) -> list[dict[str, object]]:
    command = [sys.executable, str(BENCHMARKS / name), "--quick", "--json", str(file), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "left out" not in done.stdout
    return json.loads(file.read_text())["rows"]


@pytest.mark.slow
def test_p1_gpu_runs_without_a_gpu(tmp_path):
    rows = figures("p1_gpu.py", "--device", "cpu", file=tmp_path / "rows.json")
    assert [row["figure"] for row in rows] == [
        "largest micro-batch",
        "steps of 8: pairs/s, transformers' Trainer",
        "steps of 8: pairs/s, open_clip's loop",
        "steps of 8: pairs/s, sentence-transformers",
        "steps of 8: TFLOP/s",
        "steps of 8: seconds waiting",
        "steps of 16: pairs/s, sentence-transformers",
        "steps of 16: TFLOP/s",
        "steps of 16: seconds waiting",
        "steps of 8, compiled: pairs/s, not compiled",
    ]
    assert all(row["ours"] > 0 for row in rows)


@pytest.mark.slow
def test_the_roofline_counts_operators(fake_card, tmp_path):
    (row,) = figures("roofline.py", file=tmp_path / "rows.json")
    assert row["model"] == "B/32 dual_lora"
    assert row["products_us"] == pytest.approx(51, rel=0.1)
    assert 0 < row["elementwise_us"] < 57 and 0 < row["launches"] < 1900


@pytest.mark.slow
def test_the_table_of_budgets_keeps_what_it_promises(tmp_path):
    for row in figures("budget_table.py", file=tmp_path / "rows.json"):
        promised, kept = (int(str(row[name]).rstrip("%")) for name in ("promised", "kept"))
        assert promised <= kept
