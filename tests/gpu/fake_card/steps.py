"""Runs clipft on the fake card with each of the settings in a list, and prints what happened.

Started by ``build.run`` with a list of [name, settings] and a folder of shards. The output, JSON,
has an ``Outcome`` for each name, and what is in ``whole_run``.
"""

import json
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.fake_card.card import CARD, Card, Images, Roofline, believe


@dataclass
class Outcome:
    """What some steps, or a validation, did on the card.

    ``attention`` has [kernel, rows, queries, keys, calls]. ``error`` is empty if there was none.
    """

    error: str = ""
    applied: list[bool] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    attention: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)
    most_images: int = 0

    def take(self, card: Card, counted: Roofline) -> None:
        """Note what was counted."""
        self.reads, self.operators = dict(card.reads), dict(counted.calls)
        self.attention = [(*key, calls) for key, calls in counted.attention.items()]
        self.images, self.most_images = list(card.images), card.most_images


def steps(flags: dict[str, Any]) -> Outcome:
    """Train with these settings; ``longest`` are the tokens of the longest caption of each step."""
    from tests.gpu.fake_card.run_of import Run

    longest = flags.pop("longest", [30])
    run, counted, outcome = Run.of(**flags), Roofline(), Outcome()
    run.card.reads.clear()
    try:
        with counted:
            outcome.applied = [result.applied for result in run.steps(longest)]
    except Exception as error:
        outcome.error = "".join(traceback.format_exception(error)[-12:])
    outcome.take(run.card, counted)
    return outcome


def whole_run(data_dir: Path) -> dict[str, Outcome]:
    """Validate and train on real pairs, with a loader that pins its memory."""
    from tests.gpu.fake_card.run_of import WholeRun

    sizes = {"effective_batch_size": 16, "micro_batch_size": 8, "num_workers": 0}
    few = {"max_train_pairs": 32, "max_val_pairs": 16}
    whole = WholeRun(data_dir, {**sizes, **few, "output_dir": str(data_dir.parent / "runs")})
    found = dict[str, Outcome]()
    for name in ("validate", "train"):
        outcome, counted = Outcome(), Roofline()
        whole.card.reads.clear()
        whole.card.images.clear()
        try:
            with counted:
                getattr(whole, name)()
        except Exception as error:
            outcome.error = "".join(traceback.format_exception(error)[-12:])
        outcome.take(whole.card, counted)
        found[name] = outcome
    return found


def mixed() -> str:
    """What is said when tensors on two devices are added."""
    import torch

    with Card():
        try:
            torch.empty(3, device=CARD) + torch.ones(3)
        except RuntimeError as error:
            return str(error)
    return ""


def main() -> None:
    believe()
    asked, data_dir = sys.argv[1:]
    found: dict[str, Any] = {name: asdict(steps(flags)) for name, flags in json.loads(asked)}
    found |= {name: asdict(outcome) for name, outcome in whole_run(Path(data_dir)).items()}
    json.dump({**found, "mixed": mixed()}, sys.stdout)


if __name__ == "__main__":
    main()
