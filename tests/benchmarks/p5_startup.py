"""P5: measure the time for help, for error messages, and until a command begins to compute.

    python tests/benchmarks/p5_startup.py [--quick] [--json FILE]

Each command runs as its own process with the same interpreter and with its files in the page cache,
and all commands run in turn in each round. Help and refused commands are compared with an empty
Python program, from start to end. The time to the first work ends at the first forward pass, or
when a command that runs no model begins its main work. It is compared with the import of torch and
CLIP's classes alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from clipft.cli.app import COMMANDS
from tests.benchmarks.side_by_side import arguments, write_figures
from tests.conftest import write_shard
from tests.tiny_run import TINY

HELP_GOAL, REFUSAL_GOAL = 0.35, 0.5
"""Seconds more than an empty Python program."""
FIRST_WORK_GOAL = 1.1
"""A multiple of the time to import torch and CLIP's classes."""

NOTHING = ["-c", "pass"]
LIBRARIES = [
    "-c",
    "import os, torch; from transformers import CLIPModel, CLIPTokenizerFast; os._exit(0)",
]
CLIPFT = ["-m", "clipft"]
SHOWN = ("train", "sync")
"""Commands whose help has its own row: the one with the most options, and one with few."""

REFUSED = (
    "train --data-dir nope --model tiny",
    "train --data-dir {data} --model ./nope",
    "train --data-dir {data} --model tiny --group-field nope",
    "train --scenario dual_lara",
    "resume --output-dir nope",
    "evaluate nope --data-dir {data}",
    "evaluate {data}/train/0.tar --data-dir {data}",
    "zero-shot --model tiny --data-dir nope",
    "search tiny nope lamp",
    "export {run} {data}",
    "inspect nope",
    "pack nope {new}",
)
_FORWARD = ("clipft.models.architectures", "Architecture.image_features,Architecture.text_features")
FIRST_WORK = {
    "train --data-dir {data} --model tiny --output-dir other": _FORWARD,
    "evaluate {run} --data-dir {data}": _FORWARD,
    "zero-shot --model tiny --data-dir {data}": _FORWARD,
    "search {run} {data} lamp": _FORWARD,
    "find-batch-size --model tiny --effective-batch-size 64": _FORWARD,
    "export {run} exported": ("clipft.export.export", "export_model"),
    "inspect {data} --model tiny": ("clipft.data.pair_facts", "read_facts"),
    "report {run}": ("clipft.report.run_page", "run_page"),
    "pack {data} shards": ("clipft.data.packing.scan", "scan"),
}
"""Each command line, with a module and its functions. The first call of one of them ends the
measurement."""
QUICK = 3
"""Command lines of each kind that ``--quick`` measures."""

_UNTIL = """
import importlib.util, os, sys

class Until:
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_replace(loaded):
            load(loaded)
            for dotted in functions.split(","):
                *owners, last = dotted.split(".")
                place = loaded
                for owner in owners:
                    place = getattr(place, owner)
                setattr(place, last, lambda *given, **named: os._exit(0))
        spec.loader.exec_module = load_and_replace
        return spec

module, functions, *args = sys.argv[1:]
sys.meta_path.insert(0, Until())
from clipft.cli.app import run
run(args)
sys.exit(f"clipft {' '.join(args)} ended without its work")
"""
"""A program that runs a command until it calls one of the functions, and then exits with 0."""


@dataclass(frozen=True)
class Row:
    """``seconds`` and ``compared`` are medians over the rounds; ``spread`` is the smallest and the
    largest value of ``compared``, which is a difference in seconds or a ratio."""

    measured: str
    command: str
    seconds: float
    compared: str
    spread: str
    goal: str


def seconds_of(args: Sequence[str], code: int | None = 0) -> float:
    """Run Python and measure the time from start to end. ``code`` None means any error."""
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != code and not (code is None and 1 < done.returncode < 10):
        raise SystemExit(f"{' '.join(args)} ended with code {done.returncode}: {done.stderr}")
    return seconds


def in_turn(
    ways: Sequence[Sequence[str]], beside: Sequence[str], rounds: int, code: int | None
) -> tuple[list[float], list[list[float]]]:
    """Time ``beside`` and all ``ways`` in each round; return the times of ``beside`` and of each
    way."""
    found = [[seconds_of(beside), *(seconds_of(way, code) for way in ways)] for _ in range(rounds)]
    nothing, *times = (list(column) for column in zip(*found, strict=True))
    return nothing, times


def over_python(
    measured: str, command: str, times: Sequence[float], nothing: Sequence[float], goal: float
) -> Row:
    over = sorted(a - b for a, b in zip(times, nothing, strict=True))
    middle = statistics.median(over)
    missed = ", missed" if goal and middle > goal else ""
    return Row(
        measured,
        command,
        statistics.median(times),
        f"+{middle:.2f} s",
        f"{over[0]:.2f}..{over[-1]:.2f}",
        f"{goal:g} s{missed}" if goal else "",
    )


def over_libraries(command: str, times: Sequence[float], libraries: Sequence[float]) -> Row:
    ratios = sorted(a / b for a, b in zip(times, libraries, strict=True))
    middle = statistics.median(ratios)
    return Row(
        "first work",
        command,
        statistics.median(times),
        f"{middle:.2f}x",
        f"{ratios[0]:.2f}..{ratios[-1]:.2f}",
        f"{FIRST_WORK_GOAL:g}x{', missed' if middle > FIRST_WORK_GOAL else ''}",
    )


def help_rows(rounds: int, names: Sequence[str]) -> list[Row]:
    """Measure the help of the tool and of ``names``. Except for ``SHOWN``, only the slowest command
    is shown."""
    hf = ["-c", "from huggingface_hub.cli.hf import main; main()", "--help"]
    ways = [[*CLIPFT, "--help"], hf, *([*CLIPFT, name, "--help"] for name in names)]
    nothing, (own, peer, *times) = in_turn(ways, NOTHING, rounds, 0)
    rows = [
        over_python("help", f"clipft {name} --help", each, nothing, HELP_GOAL)
        for name, each in zip(names, times, strict=True)
    ]
    others = [row for name, row in zip(names, rows, strict=True) if name not in SHOWN]
    shown = [row for name, row in zip(names, rows, strict=True) if name in SHOWN]
    shown += [max(others, key=lambda row: row.seconds)] if others else []
    return [
        over_python("help", "hf --help", peer, nothing, 0),
        over_python("help", "clipft --help", own, nothing, HELP_GOAL),
        *shown,
    ]


def first_words(line: str) -> str:
    """Shorten a command line for the table, without the temporary folders in it."""
    return f"clipft {line}".replace("{", "").replace("}", "")


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    given = parser.parse_args()
    rounds, most = (2, QUICK) if given.quick else (5, None)
    names = [*SHOWN, *(name for name in COMMANDS if name not in SHOWN)][:most]
    with tempfile.TemporaryDirectory() as made, chdir(made):
        root = Path(made)
        os.environ["CLIPFT_CACHE"] = str(root / "cache")
        write_shard(root / "data" / "train" / "0.tar", range(64))
        write_shard(root / "data" / "val" / "0.tar", range(1000, 1032))
        train = [*CLIPFT, "train", "--data-dir", "data", "--output-dir", "runs", *TINY]
        seconds_of([*train, "--scenario", "dual_lora"])  # a warm-up, too: compiles, fills the cache
        places = {"data": "data", "run": "runs/dual_lora", "new": "new"}

        rows = help_rows(rounds, names)
        refused = [[*CLIPFT, *line.format(**places).split()] for line in REFUSED[:most]]
        nothing, times = in_turn(refused, NOTHING, rounds, None)
        rows += [
            over_python("refusal", first_words(line), each, nothing, REFUSAL_GOAL)
            for line, each in zip(REFUSED, times, strict=False)
        ]
        work = [
            ["-c", _UNTIL, *mark, *line.format(**places).split()]
            for line, mark in list(FIRST_WORK.items())[:most]
        ]
        libraries, times = in_turn(work, LIBRARIES, 2 if given.quick else 4, 0)
        rows += [
            over_libraries(first_words(line), each, libraries)
            for line, each in zip(FIRST_WORK, times, strict=False)
        ]
    print(f"{'':10} {'':58} {'seconds':>8} {'compared':>9} {'spread':>12}  goal")
    for row in rows:
        print(
            f"{row.measured:10} {row.command:58} {row.seconds:8.2f} {row.compared:>9} "
            f"{row.spread:>12}  {row.goal}"
        )
    print(f"{'':10} {'python -c pass':58} {statistics.median(nothing):8.2f}")
    print(f"{'':10} {'import of torch and CLIP':58} {statistics.median(libraries):8.2f}")
    if given.json:
        packages = ("typer", "pydantic", "huggingface_hub", "torch", "transformers")
        write_figures(given.json, "P5 start-up", rows, packages)


if __name__ == "__main__":
    main()
