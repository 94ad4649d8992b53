"""Compare the speed of a step of 64 pairs with both towers compiled (torch.compile) and without.

    python tests/benchmarks/p1_compile.py --photos DIR [--quick] [--json FILE]

Chunks have a limited number of shapes, and a tower is compiled for each shape. ``graphs`` is the
number of graphs that were compiled in all rounds, and ``compile_s`` is how much longer the first
step took than a later one.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from p1_gpu import ours
from p1_training import QUICK, Place, Size, make_model
from side_by_side import arguments, in_turn, ratio_of, write_figures
from torch._dynamo.utils import counters

from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack

SIZE, ROUNDS = Size(64, 64, 32), 3


@dataclass(frozen=True)
class Row:
    """Samples per second (medians); ``times_as_fast`` is the median of the ratios of all rounds."""

    scenario: str
    compiled: float
    plain: float
    times_as_fast: float
    spread: str
    compile_s: float
    graphs: int


def measured(place: Place, size: Size, scenario: str) -> Row:
    compiled, plain = (
        ours(place, size, compile=on, scenario=scenario).work for on in (True, False)
    )
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
