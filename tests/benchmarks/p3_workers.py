"""Measure the cost of workers: wall time and processor time per pair in microseconds (of the main
process and all workers), and the peak of /dev/shm.

Another version of clipft, such as a ``git worktree``, can be measured in turn with this one. The
images are JPEGs of 500 x 500, and the same images packed with ``--size 256``. A step has 1,024
pairs.

    python tests/benchmarks/p3_workers.py [--against FOLDER] [--quick] [--json FILE]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from p3_data_path import CAPTIONS, photos, write_shards
from side_by_side import arguments, write_figures

from clipft.data.captions.table import LiveCaptions
from clipft.data.captions.template import DEFAULT_TEMPLATE
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.data.shards.folders import open_pairs
from clipft.models.pretrained import load_inputs

STEP = 1024
SHARED = "/dev/shm"


@dataclass(frozen=True)
class Figures:
    """Medians of microseconds per pair, and the peak of /dev/shm in MiB."""

    version: str
    images: str
    workers: int
    micro_batch: int
    clock: float
    processors: float
    shared_mib: float


def measure(folder: Path, workers: int, micro: int, count: int) -> tuple[float, float, float]:
    """Return the figures of ``count`` steps within a run, and the peak since its start."""
    captions = LiveCaptions(DEFAULT_TEMPLATE, CaptionEncoder(load_inputs("tiny").tokenizer, 77))
    pairs, peak, used = open_pairs(folder), [0], psutil.disk_usage(SHARED).used

    def watch() -> None:
        while True:
            peak.append(psutil.disk_usage(SHARED).used - used)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    how, plan = Preprocessing(captions, 224, "simple", 1), EpochPlan(len(pairs), STEP, micro, 1)
    steps = training_batches(pairs, how, plan, Position(), 99, LoaderOptions(workers))
    for _ in range(2):  # the workers are then ahead, and all memory is in use
        next(steps)
    cpu, started = cpu_seconds(), time.perf_counter()
    read = sum(next(steps).pairs for _ in range(count))
    seconds = time.perf_counter() - started, cpu_seconds() - cpu
    clock, processors = (s / read * 1e6 for s in seconds)
    return clock, processors, max(peak) / 2**20


def cpu_seconds() -> float:
    """Return the processor time of this process and its workers so far."""
    this = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (this, *this.children()))


def in_version(code: Path, *given: object) -> tuple[float, float, float]:
    command = [sys.executable, __file__, "--measure", *map(str, given)]
    environment = os.environ | {"PYTHONPATH": str(code)}
    done = subprocess.run(
        command, env=environment, cwd=code, check=True, stdout=subprocess.PIPE, text=True
    )
    clock, processors, shared = json.loads(done.stdout)
    return clock, processors, shared


def write_images(root: Path, count: int) -> dict[str, Path]:
    """Write the same images unchanged and packed; return both folders."""
    files = root / "files"
    files.mkdir()
    write_shards(root / "raw", photos(None, 500, count))
    for number, data in enumerate(photos(None, 500, count)):
        (files / f"{number}.jpg").write_bytes(data)
        (files / f"{number}.txt").write_text(f"{CAPTIONS[number % 3]} {number}")
    options = PackOptions(val_share=0, size=256, processes=1)
    pack(files, root / "packed", options, lambda done, total: None)
    return {"raw 500x500": root / "raw", "packed --size 256": root / "packed" / "train"}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        folder, *numbers = sys.argv[2:]
        print(json.dumps(measure(Path(folder), *map(int, numbers))))
        return
    parser = arguments(__doc__)
    parser.add_argument("--against", type=Path, help="folder of another version of clipft")
    chosen = parser.parse_args()
    versions = {"this": Path(__file__).parents[2]}
    if chosen.against:
        versions["other"] = chosen.against.resolve()
    rows, rounds = [], 1 if chosen.quick else 3
    with tempfile.TemporaryDirectory() as place:
        folders = write_images(Path(place), 2 * STEP)
        for images, folder in folders.items():
            for workers, micro in ((1, 256), (1, 1024), (2, 256), (2, 1024)):
                case, found = (folder, workers, micro, 2 if chosen.quick else 4), []
                for _ in range(rounds):
                    found.append([in_version(code, *case) for code in versions.values()])
                for name, of_version in zip(versions, zip(*found, strict=True), strict=True):
                    *times, peaks = zip(*of_version, strict=True)
                    medians = map(statistics.median, times)
                    rows.append(Figures(name, images, workers, micro, *medians, max(peaks)))
                    print(rows[-1], flush=True)
    if chosen.json:
        write_figures(chosen.json, "P3 workers", rows, ("torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
