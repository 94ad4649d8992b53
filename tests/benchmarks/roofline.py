"""Estimate the cost of a training step on one H100 by counting operators, without a GPU.

    python tests/benchmarks/roofline.py [--quick] [--json FILE]

Both towers of clipft, in bf16 with random weights, encode 1,024 pairs with captions of 30 tokens on
the fake card of ``tests/gpu/fake_card``. Products count at 500 TFLOP/s and all other operators by
the bytes that they move at 2.6 TB/s, so the times are lower bounds and not measurements.
``recomputed`` is the total if no activations are kept, ``launches`` counts operators, and ``saved``
is the memory that a pair keeps for the backward pass.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.side_by_side import arguments, write_figures
from tests.gpu.fake_card import build

PAIRS, TOKENS = 1024, 30
ROWS = [(m, s) for m in ("B/32", "L/14") for s in ("dual_lora", "full")]
ON_CARD = "--on-the-fake-card"


@dataclass(frozen=True)
class Row:
    """Microseconds and megabytes per pair, and launches per step."""

    model: str
    products_us: float
    elementwise_us: float
    total_us: float
    elementwise_share: float
    recomputed_us: float
    launches: int
    saved_mb: float


def counted(model: str, scenario: str) -> Row:
    """Count the operators of both towers, forward and backward."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from clipft.embedding.towers import make_towers
    from tests.gpu.fake_card.card import Roofline
    from tests.gpu.fake_card.run_of import Run

    run = Run.of(
        model=model,
        scenario=scenario,
        precision="bf16",
        effective_batch_size=PAIRS,
        graph_memory=70,
    )
    trained, end = run.loaded.model.train(), int(run.loaded.base.inputs.tokenizer.eos_token_id)
    towers = make_towers(run.loaded, 0, end)  # of any shape: no padding is counted
    batch = run.batch(PAIRS, TOKENS, differing=1)
    saved: dict[tuple[str, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor._base if tensor._base is not None else tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[tower.name, storage._cdata] = storage.nbytes()
        return tensor

    forward, both = Roofline(), Roofline()
    for tower in (towers.images, towers.texts):
        with run.card, both:
            (chunk,) = tower.make_chunks([batch]).chunks
            with forward, saved_tensors_hooks(pack, lambda tensor: tensor):
                rows = tower.encode(0, chunk)
            torch.autograd.backward(rows, torch.empty_like(rows))
    trained.zero_grad(set_to_none=True)
    (products, elementwise), again = both.seconds, sum(forward.seconds)
    us = 1e6 / PAIRS
    total = products + elementwise
    return Row(
        f"{model} {scenario}",
        round(products * us, 1),
        round(elementwise * us, 1),
        round(total * us, 1),
        round(elementwise / total, 3),
        round((total + again) * us, 1),
        sum(both.calls.values()),
        round(sum(saved.values()) / PAIRS / 1e6, 1),
    )


def on_the_fake_card(rows: list[list[str]]) -> None:
    from tests.gpu.fake_card.card import believe

    believe()
    json.dump([asdict(counted(model, scenario)) for model, scenario in rows], sys.stdout)


def main() -> None:
    chosen = arguments(__doc__).parse_args()
    wanted = ROWS[:1] if chosen.quick else ROWS
    found = build.run("tests.benchmarks.roofline", ON_CARD, json.dumps(wanted))
    rows = [Row(**row) for row in json.loads(found)]
    for row in rows:
        print(row)
    if chosen.json:
        write_figures(chosen.json, "roofline", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    if ON_CARD in sys.argv:
        on_the_fake_card(json.loads(sys.argv[-1]))
    else:
        main()
