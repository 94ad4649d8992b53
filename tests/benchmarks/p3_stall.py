"""Measure how long steps wait for data if workers are one step ahead, or two batches each.

A sleep replaces the computation on a GPU, so that only the workers use the processors. It lasts as
long as the workers need for a step, times ``--slack``. An optimizer step uses ``EFFECTIVE`` pairs
in micro-batches of ``MICRO``. The images are JPEGs of 500 x 500, generated or from ``--photos``.

    python tests/benchmarks/p3_stall.py [--photos DIR] [--quick] [--json FILE]
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from p3_data_path import photos, write_shards
from side_by_side import arguments, write_figures

from clipft.data import loader
from clipft.data.batch import StepBatch
from clipft.data.captions.table import LiveCaptions
from clipft.data.captions.template import DEFAULT_TEMPLATE
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import open_pairs
from clipft.models.pretrained import load_inputs

EFFECTIVE, MICRO = 512, 32


@dataclass(frozen=True)
class Stall:
    """The shares of the time in which steps waited for data, without the first step."""

    workers: int
    step_seconds: float
    two_ahead: float
    a_step_ahead: float


def after_the_first(
    pairs: PairDataset, preprocessing: Preprocessing, workers: int
) -> Iterator[StepBatch]:
    """Return the steps of an epoch after the first one."""
    plan = EpochPlan(len(pairs), EFFECTIVE, MICRO, 1)
    steps = training_batches(pairs, preprocessing, plan, Position(), 1, LoaderOptions(workers))
    next(steps)
    return steps


def waits(pairs: PairDataset, preprocessing: Preprocessing, workers: int, sleep: float) -> float:
    """Return the share of the time spent waiting in an epoch."""
    steps = after_the_first(pairs, preprocessing, workers)
    time.sleep(sleep)
    waited, started = 0.0, time.perf_counter()
    asked = started
    for _ in steps:
        waited += time.perf_counter() - asked
        time.sleep(sleep)
        asked = time.perf_counter()
    return waited / (time.perf_counter() - started)


def needed(pairs: PairDataset, preprocessing: Preprocessing, workers: int) -> float:
    """Return the seconds that the workers need for a step if nothing else runs."""
    steps = after_the_first(pairs, preprocessing, workers)
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - started) / count


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of .jpg files to make the shards of")
    parser.add_argument("--slack", type=float, default=1.3)
    options = parser.parse_args()
    model, rows = load_inputs("tiny"), []
    captions = LiveCaptions(DEFAULT_TEMPLATE, CaptionEncoder(model.tokenizer, 77))
    preprocessing = Preprocessing(captions, 224, "simple", 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "train"
        write_shards(folder, photos(options.photos, 500, 6 * EFFECTIVE))
        pairs = open_pairs(folder)
        for workers in (1, 2):
            sleep = options.slack * needed(pairs, preprocessing, workers)
            shares: tuple[list[float], list[float]] = ([], [])
            for _ in range(1 if options.quick else 3):
                with mock.patch.object(loader, "prefetch_factor", return_value=2):
                    shares[0].append(waits(pairs, preprocessing, workers, sleep))
                shares[1].append(waits(pairs, preprocessing, workers, sleep))
            rows.append(Stall(workers, sleep, *map(statistics.median, shares)))
            print(rows[-1], flush=True)
    if options.json:
        write_figures(options.json, "P3 stall", rows, ("torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
