"""P6: memory and time per sample as the effective batch grows with a fixed micro-batch.

    python tests/benchmarks/p6_memory.py [--quick] [--json FILE]

Trains dual_lora on the packaged tiny model with micro-batches of 64 and without stored activations
(``--graph-memory 0``), for one step or more over at least 1,024 rendered pairs (``--quick``:
fewer). Each effective batch runs in its own process, in turn, ``--rounds`` times. Peak memory is
the resident memory of the process during training minus that before the first step. The memory that
must grow is listed separately: the float32 embeddings of a step and their gradients for both
towers, and the pairs of the step from the loader.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import arguments, write_figures

sys.path.insert(0, str(Path(__file__).parents[2]))

MICRO = 64
EFFECTIVE, QUICK = (256, 1024, 4096, 16384), (128, 256, 512)
MEMORY_GOAL, TIME_GOAL = 1.10, 1.05
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """``beside_mib`` is the peak without the data that a step must store. Ratios are to the first
    row."""

    effective_batch: int
    peak_mib: float
    stored_embeddings_mib: float
    stored_pairs_mib: float
    beside_mib: float
    memory_ratio: float
    ms_per_sample: float
    time_ratio: float
    met: bool


def render(folder: Path, pairs: int) -> None:
    from tests.conftest import write_shard

    shard = 1024
    for number in range(0, pairs, shard):
        path = folder / "train" / f"{number // shard:05d}.tar"
        write_shard(path, range(number, min(number + shard, pairs)))
    write_shard(folder / "val" / "00000.tar", range(pairs, pairs + 16))


def child(data: Path, effective: int, pairs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(data), str(effective), str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def in_child(data: str, effective: int, pairs: int) -> None:
    import time

    import psutil
    import torch

    from clipft.config.sources import load_settings
    from clipft.core.memory import peak_memory
    from clipft.data.loader import training_batches
    from clipft.data.order import Position
    from clipft.distributed.collectives import ALONE
    from clipft.training.loop import fit
    from clipft.training.prepare import prepare
    from clipft.training.state import TrainState

    flags = {
        "model": "tiny",
        "data_dir": data,
        "effective_batch_size": effective,
        "micro_batch_size": MICRO,
        "graph_memory": 0,
        "num_workers": 0,
        "precision": "fp32",
        "device": "cpu",
        "epochs": 2,
        "feature_cache": False,
        "max_train_pairs": pairs,
    }
    settings = load_settings(flags, environ={}).values
    setup = prepare(settings, lambda note: None, ALONE)
    state = TrainState(setup.loaded.model, setup.make_optimizer(), setup.epoch_plan.steps)
    accumulate = setup.make_accumulation(state.optimizer, lambda note: None)
    how, plan = setup.encoding.preprocessing, setup.epoch_plan
    before = psutil.Process().memory_info().rss
    spent = 0.0
    with peak_memory(torch.device("cpu")) as peak:
        batches = training_batches(setup.train, how, plan, Position(), 1, setup.loader_options)
        for result in fit(state, batches, accumulate):
            spent += result.seconds - result.data_seconds
    width = setup.loaded.model.clip.config.projection_dim
    side, context = setup.loaded.base.inputs.image_size, setup.loaded.base.inputs.context_length
    answer = {
        "peak": peak.bytes - before,
        "embeddings": effective * width * 4 * 2 * 2,
        "pairs": effective * (3 * side * side + 8 * context),
        "ms": 1000 * spent / pairs,
        "ended": time.time(),
    }
    print(json.dumps(answer))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return in_child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    effectives, least = (QUICK, 128) if options.quick else (EFFECTIVE, 1024)
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        render(Path(folder), max(effectives))
        found = [[child(Path(folder), e, max(e, least)) for e in effectives] for _ in range(rounds)]
    rows = list(rows_of(effectives, found))
    for row in rows:
        print(row)
    if options.json:
        write_figures(options.json, "P6", rows, ("torch", "transformers", "peft"))


def rows_of(effectives: tuple[int, ...], found: list[list[dict[str, Any]]]) -> Any:
    from statistics import median

    def middle(at: int, name: str) -> float:
        return median(one[at][name] for one in found)

    def beside(at: int) -> float:
        return (middle(at, "peak") - middle(at, "embeddings") - middle(at, "pairs")) / MIB

    for at, effective in enumerate(effectives):
        # Ratios within a round, because its runs see the same load of the machine
        slower = median(one[at]["ms"] / one[0]["ms"] for one in found)
        memory = beside(at) / beside(0)
        yield Row(
            effective,
            round(middle(at, "peak") / MIB, 1),
            round(middle(at, "embeddings") / MIB, 2),
            round(middle(at, "pairs") / MIB, 1),
            round(beside(at), 1),
            round(memory, 2),
            round(middle(at, "ms"), 2),
            round(slower, 2),
            memory <= MEMORY_GOAL and slower <= TIME_GOAL,
        )


if __name__ == "__main__":
    main()
