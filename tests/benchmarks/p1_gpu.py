"""P1 on a GPU: ViT-B/32, dual_lora r = 16, bf16, from packed shards to the optimizer step.

    python tests/benchmarks/p1_gpu.py --photos DIR [--json FILE]
    python tests/benchmarks/p1_gpu.py --photos DIR --device cpu --quick   # only checks that it runs

Measures an effective batch of 1,024 in one pass and one of 32,768 as 32 micro-batches of 1,024,
each against transformers' Trainer, open_clip's loop and sentence-transformers' cached loss (see
p1_training.py), and clipft with the towers compiled. ``utilised`` is the share of the speed of a
bf16 matrix product of 8,192 x 8,192 in the same run; it counts the products that the model needs,
once forward and once backward, even if some are computed twice. ``busy`` is the share of time in
which training did not wait for data. DIR holds NAME.jpg and NAME.txt; each pair is repeated as
often as necessary, with a caption of its own.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from p1_training import (
    Place,
    Size,
    make_model,
    open_clip_way,
    sentence_transformers_way,
    setup_of,
    transformers_way,
)
from peers import Machine
from side_by_side import Work, arguments, in_turn, ratio_of, write_figures
from torch.utils.flop_counter import FlopCounterMode

from clipft.data.loader import training_batches
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.runs.records import StepResult
from clipft.training.loop import fit
from clipft.training.state import TrainState

SIZES, QUICK = (
    (Size(32_768, 1_024, 1_024), Size(65_536, 32_768, 1_024)),
    (Size(16, 8, 8), Size(16, 16, 4)),
)
WORKERS, ROUNDS = 14, 3
GOALS = {"transformers' Trainer": 2.0, "open_clip's loop": 1.5, "sentence-transformers": 0.0}
PEERS: dict[str, Callable[[Place, Size], Work]] = {
    "transformers' Trainer": transformers_way,
    "open_clip's loop": open_clip_way,
    "sentence-transformers": sentence_transformers_way,
}


@dataclass(frozen=True)
class Row:
    """Samples per second (medians); ``times_as_fast`` is the median of the ratios of all rounds."""

    effective_batch: int
    against: str
    ours: float
    peer: float
    times_as_fast: float
    spread: str
    goal: str
    utilised: float
    busy: float


@dataclass
class Ours:
    """clipft at one batch size; ``steps`` are those of the last round."""

    work: Work
    state: TrainState
    steps: list[StepResult]

    @property
    def busy(self) -> float:
        later = self.steps[1:] or self.steps  # the first step waits until the workers have started
        return 1 - sum(s.data_seconds for s in later) / sum(s.seconds for s in later)


def ours(place: Place, size: Size, compiled: bool = False, **given: Any) -> Ours:
    """Train the next epoch each time the work is called."""
    setup = setup_of(place, size, **given)
    model = setup.loaded.model
    if compiled:
        model.image_features = torch.compile(model.image_features)
        model.text_features = torch.compile(model.text_features, dynamic=True)
    state = TrainState(model, setup.make_optimizer(), setup.epoch_plan.steps)
    accumulate = setup.make_accumulation(state.optimizer, print)
    steps = list[StepResult]()

    def work() -> int:
        batches = training_batches(
            setup.train,
            setup.encoding.preprocessing,
            setup.epoch_plan,
            state.position,
            state.position.epoch + 1,
            setup.loader_options,
        )
        steps[:] = fit(state, batches, accumulate)
        return sum(step.pairs for step in steps)

    return Ours(work, state, steps)


def settled(work: Work, device: str) -> Work:
    """Wait until the device has finished its queue."""

    def timed() -> int:
        pairs = work()
        if device != "cpu":
            torch.cuda.synchronize()
        return pairs

    return timed


def products_per_pair(model: Any, size: Size, device: str) -> float:
    """Floating-point operations of the forward and backward pass of one pair."""
    pixels = torch.zeros(size.micro, 3, 224, 224, dtype=torch.uint8, device=device)
    ids = torch.full((size.micro, 32), 49406, device=device)
    ids[:, -1] = 49407
    with FlopCounterMode(display=False) as counted:
        images, texts = model(pixels, ids)
        (images @ texts.T).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counted.get_total_flops()) / size.micro


def device_rate(device: str, side: int) -> float:
    """The speed of a bf16 matrix product in operations per second, median of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        settled(lambda: len(a @ b), device)()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[2:])


def measured(place: Place, size: Size, rate: float) -> list[Row]:
    device = place.machine.device
    plain = ours(place, size)
    needed = products_per_pair(plain.state.model, size, device)
    ways = {name: make(place, size) for name, make in PEERS.items()}
    ways["ours with torch.compile"] = ours(place, size, compiled=True).work
    rows = []
    for name, way in ways.items():
        pair = [settled(work, device) for work in (plain.work, way)]
        for work in pair:  # a warm-up that does not count
            work()
        row = ratio_of(name, *in_turn(pair, ROUNDS), GOALS.get(name, 0))
        least, most = row.spread
        goal = f"{row.goal:g}x{'' if row.met else ', missed'}" if row.goal else ""
        utilised = row.ours * needed / rate
        spread = f"{least:.2f}..{most:.2f}"
        figures = (row.ours, row.peer, row.ratio, spread, goal, utilised, plain.busy)
        rows.append(Row(size.effective, name, *figures))
        print(rows[-1], flush=True)
    return rows


def repeated(photos: Path, folder: Path, count: int) -> Path:
    """Write ``count`` pairs with distinct captions, because equal ones would be encoded only
    once."""
    pairs = sorted(photos.glob("*.jpg"))
    folder.mkdir()
    for i in range(count):
        photo = pairs[i % len(pairs)]
        shutil.copyfile(photo, folder / f"{i:06}.jpg")
        caption = photo.with_suffix(".txt").read_text(encoding="utf-8")
        (folder / f"{i:06}.txt").write_text(f"{caption.strip()}, {i}", encoding="utf-8")
    return folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg with .txt")
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    sizes, side = (QUICK, 512) if chosen.quick else (SIZES, 8192)
    workers = 0 if chosen.quick else WORKERS
    with tempfile.TemporaryDirectory() as made:
        machine = Machine(chosen.device, workers)
        place = Place(Path(made) / "model", Path(made) / "data", machine)
        make_model(place.model)
        most = max(size.pairs for size in sizes)
        files = repeated(chosen.photos, Path(made) / "files", most + most // 4)
        options = PackOptions(size=256, near=-1, shard_pairs=max(8, most // 64))
        pack(files, place.data, options, lambda done, total: None)
        rate = device_rate(chosen.device, side)
        rows = [row for size in sizes for row in measured(place, size, rate)]
    if chosen.json:
        packages = ("torch", "transformers", "peft", "sentence-transformers", "open_clip_torch")
        write_figures(chosen.json, "P1", rows, packages)


if __name__ == "__main__":
    main()
