"""When to stop, and which epoch was best."""

import math
from dataclasses import dataclass
from typing import Any

from clipft.runs.records import EpochResult


@dataclass
class EarlyStopping:
    """Stops after ``patience`` epochs that do not improve by ``min_delta``.

    ``watches`` is the validation ``loss``, the mean ``recall``, or ``never``: then it only
    remembers the epoch of the lowest loss. Not-a-number counts as the worst value.
    """

    watches: str
    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    def update(self, result: EpochResult) -> bool:
        """Take one epoch in; True if it improved on the best so far."""
        value = -result.recall() if self.watches == "recall" else result.val_loss
        improved = value < self.best - self.min_delta  # False for not-a-number
        if improved:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return improved

    @property
    def due(self) -> bool:
        return self.watches != "never" and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
