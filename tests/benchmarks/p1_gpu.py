"""P1 on a GPU: measurements of speed that need a GPU, for ViT-B/32, dual_lora r = 16, bf16.

    python tests/benchmarks/p1_gpu.py [--photos DIR] [--json FILE]
    python tests/benchmarks/p1_gpu.py --device cpu --quick   # only checks that it runs

The figures, in this order:

- the largest micro-batch that the search finds, against the largest that runs;
- pairs per second from packed shards to the optimizer step, in steps of 1,024, against
  transformers' Trainer, open_clip's loop and sentence-transformers' cached loss (see
  p1_training.py); and in steps of 32,768 as 32 x 1,024 against sentence-transformers, because no
  other peer has a cached loss;
- the share of the speed of a bf16 matrix product of 8,192 x 8,192 in the same run. It counts the
  products that the model needs, once forward and once backward, even if some are computed twice;
- the share of the time in which training waited for data;
- a step of 1,024 with compiled towers against one without, in TFLOP/s of needed products.

It takes under five minutes on an H100. After ``--minutes``, the remaining figures are skipped with
a note. If a peer cannot run, the reason is printed. DIR holds NAME.jpg and NAME.txt; without it,
images are generated. Each pair is repeated as often as necessary, each time with another caption.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from p3_data_path import photos as made_up_photos
from peers import Machine
from side_by_side import Work, arguments, write_figures
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from clipft.core.memory import give_back
from clipft.data.batch import Batch
from clipft.data.loader import one_ahead, training_batches
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import choose_shapes, make_towers
from clipft.runs.records import StepResult
from clipft.training.finder.probe import ModelProbe, measure
from clipft.training.loop import fit
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState

WORKERS, ROUNDS, MINUTES = 14, 2, 4.5
MOST_PAIRS = 65_536
"""The effective batch of the search for the largest micro-batch."""
TOKENS = 32
PEERS: dict[str, tuple[Callable[[Place, Size], Work], float]] = {
    "transformers' Trainer": (transformers_way, 2.0),
    "open_clip's loop": (open_clip_way, 1.5),
    "sentence-transformers": (sentence_transformers_way, 0.0),
}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
SMALL_CLIP = CLIPConfig(vision_config=SMALL, text_config=SMALL, projection_dim=32)


@dataclass(frozen=True)
class Row:
    """A figure of clipft and the figure to which it is compared.

    ``ours_over_other`` is the median of all rounds.
    """

    figure: str
    ours: float
    other: float
    ours_over_other: float
    spread: str = ""
    goal: str = ""


@dataclass
class Ours:
    """Trains with clipft, one epoch after another. ``steps`` are the steps of the last epoch."""

    setup: RunSetup
    steps: list[StepResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        optimizer = setup.make_optimizer()
        self.state = TrainState(setup.loaded.model, optimizer, setup.epoch_plan.steps)
        self.accumulate = setup.make_accumulation(optimizer, print)

    def work(self) -> int:
        """Train the next epoch, as in a run."""
        setup, position = self.setup, self.state.position
        batches = training_batches(
            setup.train,
            setup.encoding.preprocessing,
            setup.epoch_plan,
            position,
            position.epoch + 1,
            setup.loader_options,
        )
        if setup.loaded.precision.device.type == "cuda":
            batches = one_ahead(batches, self.accumulate.start_to_copy)
        self.steps[:] = fit(self.state, batches, self.accumulate)
        return sum(step.pairs for step in self.steps)

    @property
    def waiting(self) -> tuple[float, float]:
        """Seconds in which training waited for data, and all seconds. The first step is excluded,
        because it waits for the workers to start."""
        later = self.steps[1:] or self.steps
        return sum(s.data_seconds for s in later), sum(s.seconds for s in later)


def ours(place: Place, size: Size, **given: Any) -> Ours:
    return Ours(setup_of(place, size, **given))


@dataclass
class Benchmark:
    """All figures on one device. With ``quick``, everything runs, but speeds are meaningless."""

    place: Place
    quick: bool
    minutes: float

    def __post_init__(self) -> None:
        self.device = torch.device(self.place.machine.device)
        self.ends = time.monotonic() + 60 * self.minutes

    def rows(self) -> Iterator[Row]:
        sizes = (Size(16, 8, 8), Size(16, 16, 4))
        if not self.quick:
            sizes = (Size(8_192, 1_024, 1_024), Size(32_768, 32_768, 1_024))
        yield from self.found_and_true()
        rounds = 1 if self.quick else ROUNDS
        yield from self.against_peers(sizes[0], PEERS, rounds, warm=self.quick)
        last = dict(list(PEERS.items())[-1:])
        yield from self.against_peers(sizes[1], last, 1, warm=True)
        yield from self.compiled_and_plain(sizes[0])

    def late(self, what: str) -> bool:
        if time.monotonic() < self.ends:
            return False
        print(f"left out, as the {self.minutes:g} minutes are over: {what}", flush=True)
        return True

    def speed(self, work: Work) -> float:
        """Return pairs per second, starting with an empty allocator, until the device is idle."""
        give_back(self.device)
        began = time.perf_counter()
        pairs = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return pairs / (time.perf_counter() - began)

    @contextmanager
    def left_out(self, peer: str) -> Iterator[None]:
        """Print the reason if a peer cannot run, and continue with the other figures."""
        try:
            yield
        except Exception as error:
            print(f"left out: {peer}: {type(error).__name__}: {error}", flush=True)

    def run_each(self, ways: dict[str, Work]) -> dict[str, float]:
        """Run all ways in turn, without those that fail; return their pairs per second."""
        speeds = {"clipft": self.speed(ways["clipft"])}
        for peer in [way for way in ways if way not in speeds]:
            with self.left_out(peer):
                speeds[peer] = self.speed(ways[peer])
            if peer not in speeds:
                del ways[peer]
        return speeds

    def found_and_true(self) -> Iterator[Row]:
        """Compare the largest micro-batch of the search with the largest that runs (bisection)."""
        size = Size(16, 8, 8) if self.quick else Size(MOST_PAIRS, MOST_PAIRS, 1_024)
        setup = setup_of(self.place, size)
        probe = ModelProbe.of(setup.loaded, setup.settings)
        found = measure(probe, size.effective, lambda tried: None)
        fits = [p.size for p in found.probes if p.fits]
        refused = [p.size for p in found.probes if not p.fits]
        low, high = max(fits, default=0), min([*refused, size.effective + 1])
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if probe(middle).fits else (low, middle)
        ratio = found.largest / low
        yield Row("largest micro-batch", found.largest, low, ratio, goal="0.95..1.05")

    def against_peers(
        self,
        size: Size,
        peers: dict[str, tuple[Callable[[Place, Size], Work], float]],
        rounds: int,
        warm: bool = False,
    ) -> Iterator[Row]:
        """Run clipft and its peers in turn, after a warm-up of each unless ``warm`` is set."""
        name = f"steps of {size.effective:,}"
        if self.late(name):
            return
        own = ours(self.place, size)
        ways = {"clipft": own.work}
        for peer, (make, _) in peers.items():
            with self.left_out(peer):
                ways[peer] = make(self.place, size)
        if not warm:
            self.run_each(ways)
        rounds_run = [self.run_each(ways)]
        while len(rounds_run) < rounds and not self.late(f"a round of {name}"):
            rounds_run.append(self.run_each(ways))
        speeds = {way: [run[way] for run in rounds_run] for way in ways}
        fast = speeds.pop("clipft")
        for peer, slow in speeds.items():
            yield _compared(f"{name}: pairs/s, {peer}", fast, slow, peers[peer][1])
        reached = statistics.median(fast) * self.work_per_pair(own.setup.loaded)
        yield Row(f"{name}: TFLOP/s", reached, self.product_speed, reached / self.product_speed)
        waited, took = own.waiting
        yield Row(f"{name}: seconds waiting", waited, took, waited / took, goal="below 0.05")

    def compiled_and_plain(self, size: Size) -> Iterator[Row]:
        """Measure the passes of a step, with captions of full length, so that each tower has one
        shape."""
        name = f"steps of {size.effective:,}, compiled"
        if self.late(name):
            return
        if self.quick:  # the same, but without the compiler
            torch.compiler.set_stance("force_eager")
        setup = setup_of(self.place, size)
        loaded, settings = setup.loaded, setup.settings
        pad = int(loaded.base.inputs.tokenizer.eos_token_id)
        shapes = choose_shapes(loaded, True, size.micro, size.effective)
        works = []
        for compiled in (True, False):
            towers = make_towers(loaded, settings.seed, pad, shapes, compiled)
            probe = ModelProbe(
                loaded.model.train(), towers, setup.loss, loaded.base.inputs, self.device
            )
            works.append(partial(_step_of, probe, probe._batch(size.micro)))
        began = time.perf_counter()
        self.speed(works[0])
        print(f"compiling took {time.perf_counter() - began:.0f} s", flush=True)
        self.speed(works[1])
        speeds = [[self.speed(work) for work in works] for _ in range(1 if self.quick else 5)]
        compiled_speeds, plain = ([*column] for column in zip(*speeds, strict=True))
        yield _compared(f"{name}: pairs/s, not compiled", compiled_speeds, plain, 0.0)

    def work_per_pair(self, loaded: LoadedModel) -> float:
        """Return the floating-point operations for a pair, forward and backward, in 10^12."""
        pairs, side = 8, loaded.base.inputs.image_size
        end = int(loaded.base.inputs.tokenizer.eos_token_id)
        ids = 1 + torch.arange(pairs * TOKENS).view(pairs, TOKENS)
        ids[:, -1] = end
        pixels = torch.zeros(pairs, 3, side, side, dtype=torch.uint8)
        batch = Batch(pixels, ids, tuple(range(pairs)))
        towers = make_towers(loaded, 0, end)  # of any shape: padding is not needed
        with FlopCounterMode(display=False) as counted:
            for tower in (towers.images, towers.texts):
                for chunk in tower.make_chunks([batch]).chunks:
                    tower.encode(0, chunk).sum().backward()
        loaded.model.zero_grad(set_to_none=True)
        return float(counted.get_total_flops()) / pairs / 1e12

    @cached_property
    def product_speed(self) -> float:
        """Return the TFLOP/s of a plain bf16 matrix product, the median of ten."""
        side = 256 if self.quick else 8_192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in "ab")
        speeds = [self.speed(lambda: len(a @ b)) / side for _ in range(12)]
        return 2 * side**3 * statistics.median(speeds[2:]) / 1e12


def _step_of(probe: ModelProbe, batch: Batch) -> int:
    probe._step(batch)
    return len(batch)


def _compared(figure: str, ours: list[float], other: list[float], goal: float) -> Row:
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    ratio, spread = statistics.median(ratios), f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
    met = f"{goal:g}x{'' if ratio >= goal else ', missed'}" if goal else ""
    return Row(figure, statistics.median(ours), statistics.median(other), ratio, spread, met)


def repeated(photos: Path | None, folder: Path, count: int) -> Path:
    """Write ``count`` pairs with distinct captions, because equal ones are encoded only once."""
    folder.mkdir()
    found = sorted(photos.glob("*.jpg")) if photos else []
    if not found:
        for i, image in enumerate(made_up_photos(None, 500, min(count, 256))):
            found.append(folder.parent / f"{i:04}.jpg")
            found[-1].write_bytes(image)
            found[-1].with_suffix(".txt").write_text("a photo of something", encoding="utf-8")
    for i in range(count):
        photo = found[i % len(found)]
        (folder / f"{i:06}.jpg").write_bytes(photo.read_bytes())
        caption = photo.with_suffix(".txt").read_text(encoding="utf-8")
        (folder / f"{i:06}.txt").write_text(f"{caption.strip()}, {i}", encoding="utf-8")
    return folder


def options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of .jpg with .txt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to leave out the rest")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --quick checks that this benchmark runs")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        machine = Machine(chosen.device, 0 if chosen.quick else WORKERS)
        place = Place(folder / "model", folder / "data", machine)
        benchmark = Benchmark(place, chosen.quick, chosen.minutes)
        make_model(place.model, SMALL_CLIP if chosen.quick else CLIPConfig())
        most = 16 if chosen.quick else 32_768
        files = repeated(chosen.photos, folder / "files", most + most // 2)
        pack_options = PackOptions(size=256, near=-1, shard_pairs=max(8, most // 64))
        pack(files, place.data, pack_options, lambda done, total: None)
        rows = []
        for row in benchmark.rows():
            rows.append(row)
            print(row, flush=True)
    if chosen.json:
        packages = ("torch", "transformers", "peft", "sentence-transformers", "open_clip_torch")
        write_figures(chosen.json, "P1", rows, packages)


if __name__ == "__main__":
    main()
