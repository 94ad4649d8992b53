"""Does torch.compile pay? A step of 64 pairs with both towers compiled against the same as it is.

    python tests/benchmarks/p1_compile.py --photos DIR [--quick] [--json FILE]

Pieces of captions differ in length from step to step, so the text tower is compiled with dynamic
shapes; ``graphs`` counts what was compiled during all rounds, ``compile_s`` is how much longer the
first step took than a later one.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from p1_training import QUICK, Place, Size, make_model, setup_of
from side_by_side import Work, arguments, in_turn, ratio_of, write_figures
from torch._dynamo.utils import counters

from clipft.data.loader import training_batches
from clipft.data.pack import pack
from clipft.data.pack_options import PackOptions
from clipft.training.trainer import TrainState, fit

SIZE, ROUNDS = Size(64, 64, 32), 3


@dataclass(frozen=True)
class Row:
    """Samples/s (medians); ``times_as_fast`` is the median of the rounds' ratios."""

    scenario: str
    compiled: float
    plain: float
    times_as_fast: float
    spread: str
    compile_s: float
    graphs: int


def steps(place: Place, size: Size, scenario: str, compiled: bool) -> Work:
    """An epoch each time it is called, other captions first each time."""
    setup = setup_of(place, size, scenario=scenario)
    model = setup.loaded.model
    if compiled:
        model.image_features = torch.compile(model.image_features)
        model.text_features = torch.compile(model.text_features, dynamic=True)
    state = TrainState(model, setup.make_optimiser(), setup.epoch_plan.steps)
    accumulate = setup.make_accumulation(state.optimiser, print)

    def work() -> int:
        batches = training_batches(
            setup.train,
            setup.encoding.preprocessing,
            setup.epoch_plan,
            state.position,
            state.position.epoch + 1,
            setup.loader_options,
        )
        return sum(result.pairs for result in fit(state, batches, accumulate))

    return work


def measured(place: Place, size: Size, scenario: str) -> Row:
    compiled, plain = (steps(place, size, scenario, on) for on in (True, False))
    plain()
    counters.clear()
    began = time.perf_counter()
    pairs = compiled()
    first = time.perf_counter() - began
    found = in_turn((compiled, plain), ROUNDS)
    row = ratio_of(scenario, *found, 0)
    later = pairs / statistics.median(found[0])
    graphs = counters["stats"]["unique_graphs"]
    least, most = row.spread
    return Row(
        scenario, row.ours, row.peer, row.ratio, f"{least:.2f}..{most:.2f}", first - later, graphs
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg with .txt")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        place = Place(Path(made) / "model", Path(made) / "data")
        make_model(place.model)
        pack(chosen.photos, place.data, PackOptions(), lambda done, total: None)
        for scenario in ("dual_lora", "full"):
            rows.append(measured(place, QUICK if chosen.quick else SIZE, scenario))
            print(rows[-1], flush=True)
    if chosen.json:
        write_figures(chosen.json, "P1", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
