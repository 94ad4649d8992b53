"""Run clipft and its peers alternately and compute ratios with their spread."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

Work = Callable[[], int]
"""Does its work once and returns how many samples that were."""


@dataclass(frozen=True)
class Row:
    """``ours`` and ``peer`` in samples per second (medians). ``ratio`` is the median of the ratios
    of all rounds, ``spread`` their minimum and maximum. A ``goal`` of 0 means none."""

    name: str
    ours: float
    peer: float
    ratio: float
    spread: tuple[float, float]
    goal: float
    met: bool


def compare(name: str, ours: Work, peer: Work, goal: float, pairs: int) -> Row:
    """Run A B A B ..., after a warm-up of each."""
    ours(), peer()
    return ratio_of(name, *in_turn((ours, peer), pairs), goal)


def in_turn(ways: Sequence[Work], rounds: int) -> list[list[float]]:
    """Run A B C A B C ...; return the samples per second of each, round by round."""
    found = [[_speed(way) for way in ways] for _ in range(rounds)]
    return [list(speeds) for speeds in zip(*found, strict=True)]


def ratio_of(name: str, ours: Sequence[float], peer: Sequence[float], goal: float) -> Row:
    """The result of alternating rounds, given in samples per second."""
    ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
    ratio, spread = statistics.median(ratios), (ratios[0], ratios[-1])
    middle = statistics.median(ours), statistics.median(peer)
    return Row(name, *middle, ratio, spread, goal, ratio >= goal)


def _speed(work: Work) -> float:
    started = time.perf_counter()
    samples = work()
    return samples / (time.perf_counter() - started)


def clipft_json(*words: object) -> Any:
    """Run a command of clipft and return its JSON answer; end with it if it fails."""
    command = [sys.executable, "-m", "clipft", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{' '.join(command)} failed", file=sys.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="under a minute: less of the same")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def publish(figure: str, rows: list[Row], packages: tuple[str, ...], file: Path | None) -> None:
    """Print one table, and write the figures to ``path`` if it is given."""
    print(f"{'':44} {'ours':>9} {'peer':>9} {'ratio':>7} {'spread':>13} {'goal':>6}")
    for row in rows:
        spread = f"{row.spread[0]:.2f}..{row.spread[1]:.2f}"
        goal = f"{row.goal:g}x{'' if row.met else ' !'}" if row.goal else ""
        speeds = f"{row.ours:9.1f} {row.peer:9.1f} {row.ratio:6.2f}x"
        print(f"{row.name:44} {speeds} {spread:>13} {goal:>6}")
    if file:
        write_figures(file, figure, rows, packages)


def write_figures(file: Path, figure: str, rows: Sequence[Any], packages: Sequence[str]) -> None:
    """Write ``rows``, which are dataclasses or dicts, with the machine, date and versions."""
    figures = {
        "figure": figure,
        "rows": [asdict(row) if is_dataclass(row) else row for row in rows],
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), **_gpu()},
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _gpu() -> dict[str, str]:
    """The name of the GPU, if there is one."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _cpu() -> str:
    """The name of the processor, if the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
