"""P9: the time and memory of each command at 1x, 10x and 100x of 10,000 pairs.

    python tests/benchmarks/p9_scale.py [--work DIR] [--quick] [--sizes 10000,100000] [--json FILE]

Draws pairs of 8 x 8 pixels into shards, and runs each command on them as its own process with one
thread. The towers of the CLIP have one layer, so that the figures show the costs of clipft itself;
the time and memory of a real model for each pair are not included. Two processes run at a time, so
seconds are processor time. Memory is the largest resident set of a process, which includes its
mapped files. The cost for 1,000 pairs counts as start-up, and is subtracted before the exponent is
fitted (least squares of the logarithms). A command that would take more than ``--minutes`` is not
run. Its figures are extrapolated from the smaller sizes and marked with ~.

Figures are stored in DIR, and an interrupted benchmark continues with the same command, so that it
can be run in parts. The time to draw the pairs is not included in the figures; ``--draw`` only
draws them. A million pairs take 2 GB in DIR, and the results of the commands another 2 GB.
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
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures

SMALLEST, SIZES, QUICK = 1_000, "10000,100000,1000000", "2000"
IN_SHARD, BATCH = 1_000, 1_024
SIDE = 32
"""The image size of the model in pixels, and all its dimensions."""
MOST_EXPONENT = 1.1
_LEAST_SECONDS, _LEAST_MIB = 0.5, 16.0
"""Smaller growth is noise, and no exponent is fitted."""


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a process and its children, elapsed seconds, and the peak memory of the
    largest process. ``measured`` is False if the cost was extrapolated."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    measured: bool = True


Costs = dict[int, Cost]
"""The costs of one command by the number of pairs."""


def draw(pool: Path, shard: int) -> Path:
    """Write a shard of ``IN_SHARD`` pairs, unless it exists."""
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
    """Return one of 60,000 captions. In a larger set, more pairs share a caption."""
    things = ("chair", "table", "lamp", "sofa", "shelf", "stool")
    colors = ("red", "blue", "green", "oak", "black", "white", "brass", "gray", "pink", "teal")
    code = number * 7919 % 60_000
    return f"a {colors[code % 10]} {things[code // 10 % 6]}, model {code // 60}"


def lay_out(work: Path, pairs: int) -> Path:
    """Return a folder with ``pairs`` training pairs and one shard of validation pairs."""
    data, pool = work / f"data-{pairs}", work / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    numbers = {"train": range(-(-pairs // IN_SHARD)), "val": range(900_000, 900_001)}
    for split, shards in numbers.items():
        (data / split).mkdir(parents=True, exist_ok=True)
        missing = [n for n in shards if not (data / split / f"{n:06d}.tar").exists()]
        with ProcessPoolExecutor(2) as processes:
            for path in processes.map(partial(draw, pool), missing):
                os.link(path, data / split / path.name)
    return data


def make_model(work: Path) -> None:
    """Write a CLIP of one layer, with the tokenizer of the packaged model, to ``work``/model."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    import clipft.models

    tiny, unfinished = Path(clipft.models.__path__[0]) / "tiny", work / "model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(tiny, unfinished, ignore=lambda *_: ["clipft.json", "model.safetensors"])
    config = json.loads((tiny / "config.json").read_text()) | {"projection_dim": SIDE}
    small = {"hidden_size": SIDE, "intermediate_size": SIDE, "num_attention_heads": 1}
    small |= {"num_hidden_layers": 1, "projection_dim": SIDE}
    config["text_config"] |= small
    config["vision_config"] |= small | {"image_size": SIDE, "patch_size": SIDE // 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**config)).save_pretrained(unfinished)
    processor = json.loads((tiny / "preprocessor_config.json").read_text())
    processor |= {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    (unfinished / "preprocessor_config.json").write_text(json.dumps(processor))
    unfinished.rename(work / "model")


def clipft(*args: object) -> list[str]:
    return [sys.executable, "-m", "clipft", *map(str, args)]


def step(name: str, data: Path) -> list[str]:
    return [sys.executable, __file__, "--step", name, "--work", str(data)]


def training(data: Path, out: Path, *more: str) -> list[str]:
    batch = ["--effective-batch-size", BATCH, "--micro-batch-size", BATCH, "--num-workers", 0]
    batch += ["--checkpoint-every", 0]
    plain = ["--augmentation", "none", "--precision", "fp32", "--stop-on", "never", "--epochs", 3]
    scenario = ["--model", data.parent / "model", "--scenario", "linear_probe"]
    places = ["--data-dir", data, "--output-dir", out]
    return clipft("train", *scenario, *places, *batch, *plain, *more)


@dataclass(frozen=True)
class Command:
    """``args`` makes the command line from the data folder and a folder for results. The results in
    ``clean`` are deleted first. With ``one_epoch``, the command is stopped after an epoch."""

    name: str
    args: Callable[[Path, Path], list[str]]
    clean: tuple[str, ...] = ()
    one_epoch: bool = False


FIRST = Command("index of the shards", lambda data, out: step("index", data))
"""All other commands open this index."""
TRAINING = (
    Command("caption table", lambda data, out: step("captions", data)),
    Command("first batch", lambda data, out: step("first", data)),
    Command("first batch of half an epoch", lambda data, out: step("resumed", data)),
    Command("train --plan", lambda data, out: training(data, out / "runs", "--plan")),
    Command(
        "linear_probe: features, and an epoch",
        lambda data, out: training(data, out / "runs"),
        ("runs",),
        one_epoch=True,
    ),
    Command(
        "linear_probe: an epoch, features cached",
        lambda data, out: training(data, out / "runs"),
        ("runs",),
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
SEARCH = (
    Command(
        "search, nothing embedded",
        lambda data, out: clipft("search", data.parent / "model", data, "a lamp"),
    ),
    Command(
        "search again",
        lambda data, out: clipft("search", data.parent / "model", data, "a red lamp"),
    ),
    Command(
        "embed",
        lambda data, out: clipft("embed", data.parent / "model", data, out / "embedded"),
        ("embedded",),
    ),
    Command(
        "embed again",
        lambda data, out: clipft("embed", data.parent / "model", data, out / "embedded"),
    ),
)
INSPECT = Command(
    "inspect", lambda data, out: clipft("inspect", data, "--model", data.parent / "model")
)
PACK = Command(
    "pack --part 1/4",
    lambda data, out: clipft(
        *("pack", data / "train", out / "packed", "--part", "1/4", "--processes", 1)
    ),
    ("packed",),
)
CHAINS = (TRAINING, SEARCH, (INSPECT,), (PACK,))
"""Commands of a chain run one after another. The longest chains begin first."""


def do_step(name: str, data: Path) -> None:
    """Do one step that no command does alone."""
    if name == "model":
        make_model(data)
        return
    from clipft.data.captions.table import caption_table
    from clipft.data.captions.template import DEFAULT_TEMPLATE
    from clipft.data.captions.tokenizer import CaptionEncoder
    from clipft.data.decoding import Preprocessing
    from clipft.data.loader import LoaderOptions, training_batches
    from clipft.data.order import EpochPlan, Position
    from clipft.data.shards.folders import open_pairs
    from clipft.models.pretrained import load_inputs

    if name == "index":
        for index in (data / "train").glob(".*.clipft-index"):
            index.unlink()
    pairs = open_pairs(data / "train")
    if name == "index":
        return
    encoder = CaptionEncoder(load_inputs(str(data.parent / "model")).tokenizer, 77)
    captions = caption_table(pairs, DEFAULT_TEMPLATE, encoder, 1, lambda: None)
    if name == "captions":
        return
    plan = EpochPlan(len(pairs), min(BATCH, len(pairs)), 64, 1)
    start = Position() if name == "first" else Position(2, plan.steps // 2)
    preprocessing = Preprocessing(captions, SIDE, "simple", 1)
    next(training_batches(pairs, preprocessing, plan, start, 4, LoaderOptions(0)))


def measure(command: Command, work: Path, pairs: int) -> Cost:
    data, out, cache = lay_out(work, pairs), work / f"out-{pairs}", work / f"cache-{pairs}"
    out.mkdir(exist_ok=True)
    for name in command.clean:
        shutil.rmtree(out / name, ignore_errors=True)
    args, said = command.args(data, out), work / f"said-{threading.get_ident()}.txt"
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
    """Wait for the first checkpoint, and tell the process to stop."""
    while "\nState:\tZ" not in Path(f"/proc/{process.pid}/status").read_text():
        if any(out.glob("runs/*_checkpoint.pt")):
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
    """Extrapolate from the last measured size with the fitted exponent, or 1 if it is larger."""
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
    parser.add_argument("--draw", action="store_true", help="only draw the pairs into DIR")
    parser.add_argument("--only", default="", help="only commands with this in their name")
    parser.add_argument(
        "--minutes", type=float, default=20, help="most processor time of a command"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


class Figures:
    """The costs measured so far, which are stored in a file."""

    def __init__(self, work: Path) -> None:
        self._file, self._lock = work / "figures.json", threading.Lock()
        stored = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.costs: dict[str, Costs] = {
            name: {int(size): Cost(**cost) for size, cost in costs.items()}
            for name, costs in stored.items()
        }

    def add(self, name: str, size: int, cost: Cost) -> None:
        with self._lock:
            self.costs.setdefault(name, {})[size] = cost
            stored = {n: {k: asdict(c) for k, c in own.items()} for n, own in self.costs.items()}
            unfinished = self._file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(stored, indent=1))
            unfinished.rename(self._file)
            print(f"{time.strftime('%T')} {size:>9,} {name:40} {cost}", flush=True)


def run_commands(
    commands: Sequence[Command], work: Path, size: int, figures: Figures, wish: argparse.Namespace
) -> None:
    """Run the commands whose cost is not known yet, one after another."""
    for command in commands:
        costs = figures.costs.get(command.name, {})
        if wish.only not in command.name or (size in costs and costs[size].measured):
            continue
        known = {n for n, cost in costs.items() if cost.measured and n < size}
        guess = estimated(costs, size) if len(known) > 1 else Cost(0, 0, 0)
        fits = guess.cpu_s <= 60 * wish.minutes
        figures.add(command.name, size, measure(command, work, size) if fits else guess)


def benchmark(work: Path, sizes: list[int], wish: argparse.Namespace) -> list[dict[str, Any]]:
    figures = Figures(work)
    if not (work / "model").exists():
        # In a new process, because a child's peak memory starts at that of its parent
        subprocess.run(step("model", work), check=True)
    for size in (SMALLEST, *sizes):
        lay_out(work, size)
        if wish.draw:
            continue
        run_commands([FIRST], work, size, figures, wish)
        with ThreadPoolExecutor(2) as lanes:
            running = [
                lanes.submit(run_commands, commands, work, size, figures, wish)
                for commands in CHAINS
            ]
            for lane in running:
                lane.result()
    names = [command.name for command in (FIRST, *chain.from_iterable(CHAINS))]
    found = {name: figures.costs.get(name, {}) for name in names}
    return [row(name, costs, sizes) for name, costs in found.items() if costs.keys() >= {*sizes}]


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
