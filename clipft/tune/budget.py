"""How long a search may take: ``30m``, ``2h`` or a number of trials."""

import re
from dataclasses import dataclass

from clipft.core.common import counted, duration

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CONFIRMING = 0.4
"""The largest share of a time budget that is reserved to confirm the winner over seeds."""


@dataclass(frozen=True)
class Budget:
    """A number of trials, or the seconds for the whole search, including the confirmation of its
    winner. The other one is None."""

    trials: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``20`` (trials), ``90s``, ``30m``, ``2h`` or ``1.5h``.

        Raises:
            ValueError: it is none of these, or zero.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
        if not found or float(found[1]) == 0 or (not found[2] and "." in found[1]):
            raise ValueError("write a time such as 30m or 2h, or a number of trials such as 20")
        if not found[2]:
            return cls(trials=int(found[1]))
        return cls(seconds=float(found[1]) * _SECONDS[found[2]])

    def __str__(self) -> str:
        return counted(self.trials, "trial") if self.trials else duration(self.seconds or 0)

    def reserve(self, confirming: float) -> float:
        """Return the seconds to reserve if confirming the winner takes ``confirming`` seconds."""
        return min(confirming, _CONFIRMING * (self.seconds or 0))
