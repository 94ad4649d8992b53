"""The first trials of a search: changes that an engineer would try before using a sampler.

A sampler cannot learn much from five to thirty trials. So a search begins with the defaults and
makes one move at a time. A move changes one or a few settings of the best trial so far. If a change
of the learning rate improves the result, it is repeated, so a rate that should be ten times higher
is reached in a few trials. A move that does not improve the result is not tried again. When no move
is left, the sampler takes over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.tune.space import Parameters, Space


class Times(float):
    """A factor by which the current value of a setting is multiplied."""


MOVES: dict[str, Mapping[str, Any]] = {
    # The trained weights and the learning rate matter most
    "every weight": {"scenario": "full", "lr": 1.0, "lr_projections": 1.0},
    "four times the rate": {"lr": Times(4)},
    "stronger adapters": {
        **{"lora_targets": "all", "lora_dropout": 0.3, "wd": 0.3},
        "epochs": Times(1.5),
    },
    "higher rate": {"lr": Times(2)},
    "lower rate": {"lr": Times(0.5)},
    "more adapters": {"lora_targets": "all"},
    "averaged weights": {"ema": 0.99},
    "longer": {"epochs": Times(2)},
    "larger batch": {"effective_batch_size": Times(2)},
    "smaller batch": {"effective_batch_size": Times(0.5)},
    "more augmentation": {"augmentation": "advanced"},
    "more dropout": {"lora_dropout": 0.3},
    "less dropout": {"lora_dropout": 0.0},
    "higher rank": {"lora_r": Times(2)},
    "faster projections": {"lr_projections": Times(2)},
    "slower projections": {"lr_projections": Times(0.5)},
}
"""The settings that each move changes, in the order in which they are tried. A move whose first
change has been made already is left out.
"""
_REPEATED = frozenset({"higher rate", "lower rate", "longer", "larger batch", "smaller batch"})


@dataclass(frozen=True)
class Attempt:
    """A trial that has begun: its parameters, its recall if it was trained to its end, and its
    move, or None if the sampler chose it."""

    parameters: Parameters
    recall: float | None
    move: str | None = None


def next_move(space: Space, attempts: Sequence[Attempt]) -> tuple[str, dict[str, Any]] | None:
    """Choose the next change to the best attempt so far.

    Returns the name of the move and the new parameters, or None if no move is left.
    """
    if not attempts:
        return "defaults", space.default()
    finished = [attempt for attempt in attempts if attempt.recall is not None]
    start = max(finished, key=lambda attempt: attempt.recall or 0.0, default=attempts[0])
    known = [dict(attempt.parameters) for attempt in attempts]
    for name, changes in MOVES.items():
        tried = [attempt for attempt in attempts if attempt.move == name]
        repeated = name in _REPEATED and tried and tried[-1] is start
        elsewhere = "scenario" in changes and "scenario" not in space.names
        if (tried and not repeated) or elsewhere or _made(start.parameters, changes):
            continue
        parameters = _moved(space, start.parameters, changes)
        if parameters not in known:
            return name, parameters
    return None


def _made(parameters: Parameters, changes: Mapping[str, Any]) -> bool:
    name, value = next(iter(changes.items()))
    return not isinstance(value, Times) and parameters.get(name) == value


def _moved(space: Space, parameters: Parameters, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the changes that the space allows."""
    moved = dict(parameters)
    for name, change in changes.items():
        value = change
        if isinstance(change, Times):
            value = type(moved.get(name, 1.0))(round(moved.get(name, 1.0) * change, 6))
        if name in space.names and space.allows(name, value):
            moved[name] = value
    return space.completed(moved)
