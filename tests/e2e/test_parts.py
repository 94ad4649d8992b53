"""``--part I/N``: two processes at the same time make what one process makes."""

import subprocess
import sys

import numpy as np
import pyarrow
from pyarrow import parquet

from tests import warm
from tests.data.packing.pack_helpers import digests, packed


def run_two(*args):
    """Run a command as the parts 1/2 and 2/2 at once; return what each printed."""
    started = [
        warm.Popen(
            [sys.executable, "-m", "clipft", *map(str, args), "--part", f"{number}/2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (1, 2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return said


def test_two_processes_pack(catalogue, tmp_path):
    said = run_two("pack", catalogue, tmp_path / "out", "--shard-pairs", 20, "--processes", 1)
    assert all("Train when all 2 parts are in one folder" in text for text in said)
    packed(catalogue, tmp_path / "whole", shard_pairs=20)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_processes_embed(catalogue, tmp_path):
    given = ["--num-workers", 0, "--precision", "fp32", "--images"]
    said = run_two("embed", "tiny", catalogue, tmp_path / "out", *given)
    assert sum("the other parts have" in text or "Another part" in text for text in said) == 1
    files = sorted((tmp_path / "out" / "images").glob("*.parquet"))
    rows = pyarrow.concat_tables([parquet.read_table(file) for file in files])
    assert len(rows) == 136
    assert len(set(rows["key"].to_pylist())) == 136
    lengths = np.linalg.norm(np.stack(rows["vector"].to_numpy(zero_copy_only=False)), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert not list((tmp_path / "out").glob(".*"))
