"""Q4: compare ``clipft tune`` with a third of a grid's steps with the best cell of the grid.

Runs a small grid with ``clipft ablate`` and one seed, and then ``clipft tune`` over the same
settings until it has used a third of the grid's steps. Compares the best mean recall on the
validation pairs, which both maximize. Other options, such as --epochs 4, are passed to all runs. To
continue, run the same command again.

    python tests/benchmarks/q4_tune.py --data DIR --out DIR [--quick] [--json FILE] [OPTIONS]
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import arguments, clipft_json, write_figures

GRID: dict[str, tuple[Any, ...]] = {
    "lr": (2.5e-4, 1e-3, 4e-3),
    "lora_targets": ("qv", "all"),
    "lora_dropout": (0.05, 0.3),
}
QUICK: dict[str, tuple[Any, ...]] = {"lr": (1e-3, 4e-3), "lora_targets": ("qv", "all")}
SHARE, GOAL = 1 / 3, 0.99


@dataclass(frozen=True)
class Searched:
    """Mean recall in percent on the validation pairs, and the number of steps trained for it.

    ``met``: with at most a third of the steps, ``tune`` reaches 99 % of the best cell.
    """

    way: str
    runs: int
    steps: int
    best: str
    share_of_the_best_cell: str
    met: str


def fixed(wish: argparse.Namespace) -> list[object]:
    more = ["--mini-train"] if wish.quick else []
    places = ["--model", "tiny", "--data-dir", wish.data, "--resamples", 0, "--precision", "fp32"]
    return [*places, "--stop-on", "never", *more, *wish.options]


def grid(wish: argparse.Namespace, cells: dict[str, tuple[Any, ...]]) -> tuple[int, int, float]:
    """Train every cell; return the number of runs, their steps, and the best recall."""
    varied = (("--set", f"{name}={','.join(map(str, vs))}") for name, vs in cells.items())
    where = ("--output-dir", wish.out / "grid", "--seeds", 42, "--scenarios", "dual_lora")
    content = clipft_json("ablate", *fixed(wish), *where, *itertools.chain(*varied))
    best = max(variant["mean_recall"]["mean"] for variant in content["variants"])
    return len(content["runs"]), sum(run["steps"] for run in content["runs"]), best


def search(
    wish: argparse.Namespace, cells: dict[str, tuple[Any, ...]], most: float
) -> tuple[int, int, float]:
    """Add one trial at a time, as long as another complete trial fits into ``most`` steps."""
    where = ("--output-dir", wish.out / "tune", "--confirm", 1, "--search", ",".join(cells))
    where += ("--scenario", "dual_lora")
    found, tried = (0, 0, 0.0), 1
    while True:
        content = clipft_json("tune", *fixed(wish), *where, "--budget", tried)
        trials = content["trials"]
        steps = sum(trial["steps"] for trial in trials)
        longest = max(trial["steps"] for trial in trials)
        best = max(trial["recall"] for trial in trials if trial["state"] == "finished")
        found = (len(trials), steps, best)
        if steps + longest > most:
            return found
        tried += 1


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a packed catalogue")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the runs")
    wish, options = parser.parse_known_args()
    wish.options = options
    cells = QUICK if wish.quick else GRID
    runs, steps, best = grid(wish, cells)
    tried, taken, reached = search(wish, cells, steps * SHARE)
    met = "yes" if reached >= GOAL * best and taken <= steps * SHARE else "no"
    rows = [
        Searched(f"ablate, {runs} cells", runs, steps, f"{100 * best:.2f}", "100%", ""),
        Searched("tune", tried, taken, f"{100 * reached:.2f}", f"{reached / best:.1%}", met),
    ]
    for row in rows:
        print(row)
    if wish.json:
        write_figures(wish.json, "Q4", rows, ("torch", "transformers", "peft", "optuna"))


if __name__ == "__main__":
    main()
