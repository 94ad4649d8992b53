"""P9: the time and memory of each command at 1x, 10x and 100x of 10,000 pairs.

    python tests/benchmarks/p9_scale.py [--work DIR] [--quick] [--sizes 10000,100000] [--json FILE]

Draws pairs of 8 x 8 pixels into shards, and runs each command on them as a process of its own with
one thread and the packaged tiny model. Seconds are processor time, and memory is the largest
resident set of a process, which includes the files that it maps. What a command takes for 1,000
pairs is its start-up, and is subtracted before the exponent is fitted (least squares in the
logarithms). A command that would take more than ``--minutes`` is not run: its figures follow from
the sizes below, and are marked with ~.

Figures are kept in DIR, so that a benchmark that was interrupted goes on. A million pairs take 2 GB
there, and what is made of them 1 GB at a time.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures

SMALLEST, SIZES, QUICK = 1_000, "10000,100000,1000000", "2000"
IN_SHARD, BATCH = 1_000, 1_024
MOST_EXPONENT = 1.1
_LEAST_SECONDS, _LEAST_MIB = 0.5, 16.0
"""Growth below this is noise: it gets no exponent."""


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a process and its children, elapsed seconds, and the peak of the largest
    of them; ``measured`` is False for arithmetic."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    measured: bool = True


Costs = dict[int, Cost]
"""The costs of one command by the number of pairs."""


def draw(pool: Path, shard: int) -> Path:
    """Write a shard of ``IN_SHARD`` pairs, unless it is there."""
    path = pool / f"{shard:06d}.tar"
    if path.exists():
        return path
    random = np.random.default_rng(shard)
    pixels = random.integers(0, 256, (IN_SHARD, 4, 4, 3), np.uint8).repeat(2, 1).repeat(2, 2)
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, image in enumerate(pixels):
            number, buffer = shard * IN_SHARD + place, io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=60, optimize=True)
            for kind, data in (("jpg", buffer.getvalue()), ("txt", caption(number).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    unfinished.rename(path)
    return path


def caption(number: int) -> str:
    """One of 60,000 captions: in a larger set, more pairs share one."""
    things = ("chair", "table", "lamp", "sofa", "shelf", "stool")
    colors = ("red", "blue", "green", "oak", "black", "white", "brass", "gray", "pink", "teal")
    code = number * 7919 % 60_000
    return f"a {colors[code % 10]} {things[code // 10 % 6]}, model {code // 60}"


def lay_out(work: Path, pairs: int) -> Path:
    """Return a folder of so many training pairs and one shard of validation pairs."""
    data = work / f"data-{pairs}"
    (work / "pool").mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", range(-(-pairs // IN_SHARD))), ("val", [900_000])):
        (data / split).mkdir(parents=True, exist_ok=True)
        for shard in shards:
            link = data / split / f"{shard:06d}.tar"
            if not link.exists():
                os.link(draw(work / "pool", shard), link)
    return data


def clipft(*args: object) -> list[str]:
    return [sys.executable, "-m", "clipft", *map(str, args)]


def step(name: str, data: Path) -> list[str]:
    return [sys.executable, __file__, "--step", name, "--work", str(data)]


def training(data: Path, out: Path, *more: str) -> list[str]:
    batch = ["--effective-batch-size", BATCH, "--micro-batch-size", BATCH, "--num-workers", 0]
    batch += ["--checkpoint-every", 0]
    plain = ["--augmentation", "none", "--precision", "fp32", "--stop-on", "never", "--epochs", 3]
    scenario = ["--model", "tiny", "--scenario", "linear_probe"]
    places = ["--data-dir", data, "--output-dir", out]
    return clipft("train", *scenario, *places, *batch, *plain, *more)


@dataclass(frozen=True)
class Command:
    """``args`` makes the command line from the data folder and a folder for its results. Before it
    the results in ``clean`` are deleted. With ``one_epoch`` it is asked to stop after an epoch."""

    name: str
    args: Callable[[Path, Path], list[str]]
    clean: tuple[str, ...] = ()
    one_epoch: bool = False


COMMANDS = (
    Command("index of the shards", lambda data, out: step("index", data)),
    Command("caption table", lambda data, out: step("captions", data)),
    Command("first batch", lambda data, out: step("first", data)),
    Command("first batch of half an epoch", lambda data, out: step("resumed", data)),
    Command(
        "train --plan, with its features", lambda data, out: training(data, out / "runs", "--plan")
    ),
    Command("inspect", lambda data, out: clipft("inspect", data, "--model", "tiny")),
    Command(
        "pack --part 1/4",
        lambda data, out: clipft(
            *("pack", data / "train", out / "packed", "--part", "1/4", "--processes", 1)
        ),
        ("packed",),
    ),
    Command("search, nothing embedded", lambda data, out: clipft("search", "tiny", data, "a lamp")),
    Command("search again", lambda data, out: clipft("search", "tiny", data, "a red lamp")),
    Command(
        "embed",
        lambda data, out: clipft("embed", "tiny", data, out / "embedded"),
        ("packed", "embedded"),
    ),
    Command("embed again", lambda data, out: clipft("embed", "tiny", data, out / "embedded")),
    Command(
        "linear_probe: an epoch, features cached",
        lambda data, out: training(data, out / "runs"),
        ("embedded", "runs"),
        one_epoch=True,
    ),
    Command(
        "resume: two epochs, evaluation",
        lambda data, out: clipft("resume", out / "runs" / "linear_probe"),
    ),
    Command(
        "evaluate on all pairs",
        lambda data, out: clipft(
            *("evaluate", out / "runs" / "linear_probe", "--data-dir", data / "train")
        ),
    ),
)


def do_step(name: str, data: Path) -> None:
    """Do what no command does alone."""
    from clipft.data.captions.table import caption_table
    from clipft.data.captions.template import DEFAULT_TEMPLATE
    from clipft.data.captions.tokenizer import CaptionEncoder
    from clipft.data.decoding import Preprocessing
    from clipft.data.loader import LoaderOptions, training_batches
    from clipft.data.order import EpochPlan, Position
    from clipft.data.shards.dataset import open_pairs
    from clipft.models.pretrained import load_inputs

    pairs = open_pairs(data / "train")
    if name == "index":
        return
    encoder = CaptionEncoder(load_inputs("tiny").tokenizer, 77)
    captions = caption_table(pairs, DEFAULT_TEMPLATE, encoder, 1, lambda: None)
    if name == "captions":
        return
    plan = EpochPlan(len(pairs), min(BATCH, len(pairs)), 64, 1)
    start = Position() if name == "first" else Position(2, plan.steps // 2)
    preprocessing = Preprocessing(captions, 72, "simple", 1)
    next(training_batches(pairs, preprocessing, plan, start, 4, LoaderOptions(0)))


def measure(command: Command, work: Path, pairs: int) -> Cost:
    data, out, cache = lay_out(work, pairs), work / f"out-{pairs}", work / f"cache-{pairs}"
    out.mkdir(exist_ok=True)
    for name in command.clean:
        shutil.rmtree(out / name, ignore_errors=True)
    args, said = command.args(data, out), work / "said.txt"
    environment = os.environ | {"CLIPFT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with said.open("wb") as file:
        process = subprocess.Popen(args, env=environment, stdout=file, stderr=file)
        if command.one_epoch:
            stop_after_an_epoch(process, out)
        _, status, usage = os.wait4(process.pid, 0)
    elapsed, code = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
    if code not in ((0, 75) if command.one_epoch else (0,)):
        text = said.read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{' '.join(args)} ended with {code}:\n{text[-3000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, elapsed, usage.ru_maxrss / 1024)


def stop_after_an_epoch(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Wait for the first checkpoint, and ask the process to stop."""
    while "\nState:\tZ" not in Path(f"/proc/{process.pid}/status").read_text():
        if any(out.glob("runs/*/*_checkpoint.pt")):
            os.kill(process.pid, signal.SIGTERM)
            return
        time.sleep(0.02)


def growth(costs: Costs, value: Callable[[Cost], float], least: float) -> float | None:
    """Fit the exponent of a cost without its start-up; None if it hardly grows."""
    start = value(costs[SMALLEST])
    grown = {pairs: value(cost) - start for pairs, cost in costs.items() if cost.measured}
    points = [(math.log(pairs), math.log(more)) for pairs, more in grown.items() if more > least]
    return float(np.polyfit(*np.array(points).T, 1)[0]) if len(points) > 1 else None


def estimated(costs: Costs, pairs: int) -> Cost:
    """Extend the growth from the start-up to the last measured size, by the fitted exponent."""
    last = max(size for size, cost in costs.items() if cost.measured)

    def extended(value: Callable[[Cost], float], least: float) -> float:
        start, power = value(costs[SMALLEST]), growth(costs, value, least) or 1.0
        more = max(0.0, value(costs[last]) - start)
        return start + more * (pairs / last) ** max(1.0, power)

    seconds = extended(lambda cost: cost.cpu_s, _LEAST_SECONDS)
    return Cost(seconds, seconds, extended(lambda cost: cost.peak_mib, _LEAST_MIB), False)


def row(name: str, costs: Costs, sizes: list[int]) -> dict[str, Any]:
    seconds = growth(costs, lambda cost: cost.cpu_s, _LEAST_SECONDS)
    memory = growth(costs, lambda cost: cost.peak_mib, _LEAST_MIB)
    found: dict[str, Any] = {"command": name}
    for what, value, power in (
        ("s", lambda cost: cost.cpu_s, seconds),
        ("MiB", lambda cost: cost.peak_mib, memory),
    ):
        for size in sizes:
            cost = costs[size]
            found[f"{size:,}: {what}"] = f"{'' if cost.measured else '~'}{_short(value(cost))}"
        mark = ", missed" if power and power > MOST_EXPONENT else ""
        found[f"exponent of {what}"] = f"{power:.2f}{mark}" if power else "-"
    return found


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, help="folder for data and figures; kept")
    parser.add_argument("--sizes", default=SIZES, help=f"default: {SIZES}")
    parser.add_argument("--only", default="", help="only commands with this in their name")
    parser.add_argument(
        "--minutes", type=float, default=20, help="most processor time of a command"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def benchmark(work: Path, sizes: list[int], wish: argparse.Namespace) -> list[dict[str, Any]]:
    file = work / "figures.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    known = {n: {int(k): Cost(**v) for k, v in costs.items()} for n, costs in stored.items()}
    for size in (SMALLEST, *sizes):
        for command in COMMANDS:
            costs = known.setdefault(command.name, {})
            if wish.only not in command.name or (size in costs and costs[size].measured):
                continue
            larger = size > min(sizes)
            guess = estimated(costs, size) if larger else Cost(0, 0, 0)
            fits = guess.cpu_s <= 60 * wish.minutes
            costs[size] = measure(command, work, size) if fits else guess
            print(f"{size:>9,} {command.name:34} {costs[size]}", flush=True)
            stored = {n: {k: asdict(c) for k, c in own.items()} for n, own in known.items()}
            file.write_text(json.dumps(stored, indent=1))
    return [row(name, costs, sizes) for name, costs in known.items() if costs.keys() >= {*sizes}]


def main() -> None:
    wish = chosen()
    if wish.step:
        do_step(wish.step, wish.work)
        return
    sizes = [int(size) for size in (QUICK if wish.quick else wish.sizes).split(",")]
    with contextlib.ExitStack() as stack:
        work = wish.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        rows = benchmark(work, sizes, wish)
    for found in rows:
        print(found)
    if wish.json:
        write_figures(wish.json, "P9 scale", rows, ("torch", "numpy", "pyarrow"))


if __name__ == "__main__":
    main()
