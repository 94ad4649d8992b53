"""Compare the graphs that a step keeps on cards of several sizes with the forecast of the search.

    python tests/benchmarks/budget_table.py [--quick] [--json FILE]

The search for a micro-batch, the plan and the step are clipft's own. The card is simulated: it
holds the weights of ViT-B/32 or ViT-L/14 with dual_lora in bf16, and a step needs twice the bytes
of its activation graphs. ``processes`` share the effective batch, and each has a card. ``promised``
is the share of the graphs that the search expects a step to keep with the chosen micro-batch, and
``kept`` is the share that the step keeps.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from side_by_side import arguments, write_figures

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training.modelled_card import MODELS, ModelledCard

CARDS, PROCESSES, EFFECTIVE = (24, 48, 80), (1, 8), (1_024, 4_096)


@dataclass(frozen=True)
class Row:
    """Percent of a step's activation graphs."""

    model: str
    card_gib: int
    processes: int
    effective_batch: int
    micro_batch: int
    promised: str
    kept: str


def row(model: str, gib: int, processes: int, effective: int) -> Row:
    card, own = ModelledCard(gib, model), effective // processes
    found = card.search(own)
    kept = card.step_keeps(found.chosen, own)
    return Row(model, gib, processes, effective, found.chosen, f"{found.kept:.0%}", f"{kept:.0%}")


def main() -> None:
    chosen = arguments(__doc__).parse_args()
    cards = CARDS[-1:] if chosen.quick else CARDS
    rows = [row(*each) for each in product(MODELS, cards, PROCESSES, EFFECTIVE)]
    for each in rows:
        print(each)
    if chosen.json:
        write_figures(chosen.json, "memory budget", rows, ("torch",))


if __name__ == "__main__":
    main()
