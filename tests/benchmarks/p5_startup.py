"""P5: measure how long the help takes, beyond an empty Python program and next to `hf --help`.

    python tests/benchmarks/p5_startup.py [--quick] [--json FILE]

Each command runs as its own process with the same interpreter and with its files in the page cache,
all of them in turn in each round. The time is that from start to end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures

GOAL_S = 0.25
"""Seconds beyond an empty Python program."""
NOTHING = ["-c", "pass"]
OURS = {
    "clipft --help": ["-m", "clipft", "--help"],
    "clipft train --help": ["-m", "clipft", "train", "--help"],
    "clipft sync --help": ["-m", "clipft", "sync", "--help"],
}
PEER = ["-c", "from huggingface_hub.cli.hf import main; main()", "--help"]


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; ``spread`` is the smallest and largest time beyond Python's."""

    command: str
    seconds: float
    over_python_s: float
    spread: str
    over_hf: float
    goal: str


def seconds_of(args: Sequence[str]) -> float:
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def row_of(
    command: str, ours: Sequence[float], nothing: Sequence[float], peer: Sequence[float]
) -> Row:
    over = sorted(a - b for a, b in zip(ours, nothing, strict=True))
    share = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    met = statistics.median(over) <= GOAL_S and share < 1
    return Row(
        command=command,
        seconds=statistics.median(ours),
        over_python_s=statistics.median(over),
        spread=f"{over[0]:.3f}..{over[-1]:.3f}",
        over_hf=share,
        goal=f"{GOAL_S:g} s over Python, below hf{'' if met else ', missed'}",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    given = parser.parse_args()
    ways = [NOTHING, PEER, *OURS.values()]
    for way in ways:
        seconds_of(way)  # a warm-up that does not count: compiles, and reads from the disk
    rounds = [[seconds_of(way) for way in ways] for _ in range(3 if given.quick else 15)]
    nothing, peer, *ours = zip(*rounds, strict=True)
    rows = [row_of(name, times, nothing, peer) for name, times in zip(OURS, ours, strict=True)]
    print(f"{'':22} {'seconds':>8} {'over Python':>12} {'spread':>13} {'over hf':>8}  goal")
    for row in rows:
        print(
            f"{row.command:22} {row.seconds:8.3f} {row.over_python_s:12.3f} {row.spread:>13} "
            f"{row.over_hf:7.2f}x  {row.goal}"
        )
    print(f"{'python -c pass':22} {statistics.median(nothing):8.3f}")
    print(f"{'hf --help':22} {statistics.median(peer):8.3f}")
    if given.json:
        write_figures(given.json, "P5 start-up", rows, ("typer", "pydantic", "huggingface_hub"))


if __name__ == "__main__":
    main()
