"""Too little memory for the micro-batch asked for: a warning before, never a killed process."""

import resource
import subprocess
import sys

import pytest

from tests import warm

LIMITED = """
import ctypes, resource, sys
# One arena (M_ARENA_MAX): glibc reserves 64 MiB for each thread's, which the limit counts
ctypes.CDLL(None).mallopt(-8, 1)
import psutil, torch
import clipft.training.prepare, transformers, peft  # their memory counts too
used = psutil.Process().memory_info().data
limit = used + {more}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from clipft.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def train_within(more: int, catalogue, out, *args: str) -> "subprocess.CompletedProcess[str]":
    command = ["train", "--model", "tiny", "--epochs", "1", "--effective-batch-size", "96"]
    command += ["--num-workers", "0", "--precision", "fp32", "--device", "cpu", *args]
    command += ["--data-dir", str(catalogue), "--output-dir", str(out)]
    code = LIMITED.format(more=more)
    return warm.run([sys.executable, "-c", code, *command], capture_output=True, text=True)


def test_a_micro_batch_that_a_cpu_cannot_hold_is_made_smaller_before(catalogue, tmp_path):
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    done = train_within(300 << 20, catalogue, tmp_path, "--micro-batch-size", "96")
    assert done.returncode == 0, done.stderr
    assert "warning: micro-batches of 96 would take about" in done.stderr
    assert "the effective batch and the loss stay as they were" in done.stderr


@pytest.mark.slow
def test_the_micro_batch_that_the_search_finds_fits(catalogue, tmp_path):
    done = train_within(1 << 30, catalogue, tmp_path)
    assert done.returncode == 0, done.stderr
