"""Measure peak memory and time of ``clipft embed`` for data sets of several sizes.

Embeds drawn pairs with the packaged tiny model. Each size has its own process.

    python tests/benchmarks/embed_memory.py [--quick] [--json FILE]
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from side_by_side import arguments, write_figures

sys.path.insert(0, str(Path(__file__).parents[2]))

SIZES, QUICK = (2_000, 20_000), (200, 1_000)
SHARD = 1000


@dataclass(frozen=True)
class Row:
    """``peak_mib`` is the largest resident memory of the process, without its workers."""

    pairs: int
    peak_mib: float
    seconds: float
    parquet_mib: float


def draw(folder: Path, first: int, last: int) -> None:
    from tests.conftest import write_shard

    for start in range(first, last, SHARD):
        numbers = range(start, min(start + SHARD, last))
        write_shard(folder / f"{start // SHARD:05d}.tar", numbers)


def embedded(data: Path, pairs: int, out: Path) -> Row:
    command = [sys.executable, "-m", "clipft", "embed", "tiny", str(data), str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed with {status}")
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in out.glob("*/*.parquet"))
    return Row(pairs, usage.ru_maxrss / 1024, seconds, size / 2**20)


def main() -> None:
    wish, rows, drawn = arguments(__doc__).parse_args(), list[Row](), 0
    with tempfile.TemporaryDirectory() as made:
        data = Path(made) / "data"
        for pairs in QUICK if wish.quick else SIZES:
            draw(data, drawn, pairs)
            drawn = pairs
            rows.append(embedded(data, pairs, Path(made) / f"embedded-{pairs}"))
            print(rows[-1], flush=True)
    if wish.json:
        write_figures(wish.json, "embed memory", rows, ("torch", "pyarrow"))


if __name__ == "__main__":
    main()
