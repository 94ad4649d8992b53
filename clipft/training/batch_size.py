"""The micro-batch: how many pairs go through the model at once.

Real forward and backward passes of the scenario at hand. Memory grows as a line with the
size, so after a few small sizes its edge is known well enough to go there directly. A GPU
says when its memory is full, so a size is simply tried; on a CPU the system might kill the
process instead, so nothing is tried that the line does not leave room for.

The largest size is not always the fastest: the choice goes by the time per pair of a whole
step, counting the second forward pass of those pairs whose graphs there is no room to keep.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from clipft.core.common import cache_folder
from clipft.core.errors import StorageError
from clipft.core.files import read_json, write_json
from clipft.core.memory import GRAPH_SHARE

MAX_PROBES = 10
_GROWTH_THAT_PAYS = 1.05
_AS_FAST = 1.02
"""Of two sizes so close in speed the smaller is taken: it leaves memory."""
_EASY = 0.9
"""Of the usable memory at most for the size that is taken: a run holds more than a step."""
_FAR, _NEAR = 1.15, 1.02
"""Margins on the slope of memory: more than twice the largest size tried, and up to there."""
SMALLEST = 4
_CLOSE_ENOUGH = 0.04
_ON_THE_LINE = 1.01
"""A guess so near to what fits tells nothing."""
_PATIENCE = 90.0
"""Seconds that sizes may take on a CPU which are tried only to know the largest."""


@dataclass(frozen=True)
class Probe:
    """One size that was tried. Seconds are of one pass over ``size`` pairs; memory in bytes."""

    size: int
    fits: bool
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    peak_bytes: int = 0

    def pairs_per_s(self, effective: int, kept: float = 0.0) -> float:
        """Training speed at an effective batch: all but the ``kept`` share of its pairs go
        forward a second time where it takes several micro-batches."""
        again = self.forward_seconds * (1 - kept) if self.size < effective else 0.0
        return self.size / (self.step_seconds + again)


@dataclass(frozen=True)
class Found:
    """``largest`` fits (``extrapolated``: by calculation, not by running); ``chosen`` is
    the fastest, with ``left_bytes`` of ``usable_bytes`` to spare. ``kept``: the share of the
    effective batch whose graphs fit into memory."""

    chosen: int
    largest: int
    extrapolated: bool
    usable_bytes: int
    probes: tuple[Probe, ...]
    left_bytes: int = 0
    kept: float = 0.0

    def speed(self, effective: int) -> float:
        """Pairs/s of ``chosen``; 0: no size fitted."""
        return max(
            (p.pairs_per_s(effective, self.kept) for p in self.probes if p.size == self.chosen),
            default=0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrySize(Protocol):
    """Runs one size for real. ``fits`` False: the memory refused it."""

    def __call__(self, size: int) -> Probe: ...


def search(try_size: TrySize, effective: int, usable_bytes: int, refuses: bool) -> Found:
    """Find the micro-batch for an effective batch, in at most ``MAX_PROBES``.

    ``refuses``: the device says when its memory is full, so a size may simply be tried.
    Otherwise nothing is tried whose extrapolated memory passes ``usable_bytes``.
    """
    sought = _Search(try_size, effective, usable_bytes, refuses)
    sought.grow()
    sought.approach_the_edge()
    return sought.found()


@dataclass
class _Search:
    try_size: TrySize
    effective: int
    usable_bytes: int
    refuses: bool
    probes: list[Probe] = field(default_factory=list)

    @property
    def fitting(self) -> list[Probe]:
        return sorted((p for p in self.probes if p.fits), key=lambda p: p.size)

    @property
    def low(self) -> int:
        return self.fitting[-1].size if self.fitting else 0

    @property
    def high(self) -> int:
        """The smallest size that is too large, as far as is known."""
        refused = [p.size for p in self.probes if not p.fits]
        return min([*refused, self.effective + 1])

    def grow(self) -> None:
        """Larger and larger, until memory or speed has an end."""
        size = min(SMALLEST, self.effective)
        while len(self.probes) < MAX_PROBES and self._allowed(size):
            self.probes.append(self.try_size(size))
            if not self.probes[-1].fits or size >= self.effective or self._levelled_off():
                return
            leap = self.refuses and 0 < self._bytes_at(size * 4) < self.usable_bytes
            size = min(size * (4 if leap else 2), self.effective)

    def approach_the_edge(self) -> None:
        """Narrow between the largest size that fits and the smallest that does not."""
        while len(self.probes) < MAX_PROBES:
            low, high = self.low, self.high
            if high - low <= max(1, int(low * _CLOSE_ENOUGH)):
                return
            guess = self._edge() if len(self.fitting) > 1 else (low + high) // 2
            if guess <= low * _ON_THE_LINE:  # beyond the line only where that does no harm
                guess = low + max(1, int(low * _CLOSE_ENOUGH)) if self.refuses else low
            if not low < guess < high or not self._affordable(guess):
                return
            self.probes.append(self.try_size(guess))

    def found(self) -> Found:
        if not self.fitting:
            return Found(1, 1, True, self.usable_bytes, tuple(self.probes))
        largest, edge = self.low, self._edge(far=_NEAR)
        extrapolated = not self.refuses and edge > largest * (1 + _CLOSE_ENOUGH)
        kept = self._kept()
        chosen = self._fastest(kept)
        left = max(0, self.usable_bytes - chosen.peak_bytes)
        return Found(
            chosen.size,
            edge if extrapolated else largest,
            extrapolated,
            self.usable_bytes,
            tuple(self.probes),
            left,
            kept,
        )

    def _fastest(self, kept: float) -> Probe:
        easy = [p for p in self.fitting if p.peak_bytes <= self.usable_bytes * _EASY]
        among = easy or self.fitting[:1]
        speeds = [(p.pairs_per_s(self.effective, kept), p) for p in among]
        best = max(speed for speed, _ in speeds)
        return next(probe for speed, probe in speeds if speed * _AS_FAST >= best)

    def _kept(self) -> float:
        """As ``training.graphs`` will have it, as far as the slope of memory tells."""
        if len(self.fitting) < 2:
            return 0.0
        first = self.fitting[0]
        fixed = first.peak_bytes - self._slope() * first.size
        graphs = max(1.0, self._slope() * self.effective)
        return min(1.0, max(0.0, (self.usable_bytes - fixed) * GRAPH_SHARE / graphs))

    def _slope(self) -> float:
        """Bytes per pair: between the largest that fits and the next one well below it."""
        largest = self.fitting[-1]
        other = next((p for p in reversed(self.fitting) if p.size <= largest.size * 0.8), None)
        if other is None:
            return 0.0
        return max(0.0, (largest.peak_bytes - other.peak_bytes) / (largest.size - other.size))

    def _bytes_at(self, size: int, far: float = _FAR) -> int:
        """Peak memory at ``size`` by the line, its slope with a margin; 0: not known yet."""
        if len(self.fitting) < 2:
            return 0
        largest = self.fitting[-1]
        margin = _NEAR if size <= largest.size * 2 else far
        return int(largest.peak_bytes + self._slope() * (size - largest.size) * margin)

    def _allowed(self, size: int) -> bool:
        return self.refuses or self._bytes_at(size) <= self.usable_bytes

    def _edge(self, far: float = _FAR) -> int:
        """The largest size that fits by the line, below what was refused."""
        low, high = self.low, self.high - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._bytes_at(middle, far) <= self.usable_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _levelled_off(self) -> bool:
        if self.refuses or len(self.probes) < 3:
            return False
        now, before = (p.pairs_per_s(self.effective) for p in self.probes[:-3:-1])
        return now < before * _GROWTH_THAT_PAYS

    def _affordable(self, size: int) -> bool:
        largest = self.fitting[-1] if self.fitting else None
        if self.refuses or largest is None:
            return True
        per_pair = (largest.step_seconds + largest.forward_seconds) / largest.size
        return size * per_pair <= _PATIENCE


class FoundCache:
    """What was found before, by model, scenario and machine. Losing it costs a search."""

    def __init__(self) -> None:
        self.path = cache_folder() / "batch_sizes.json"

    def get(self, key: str) -> Found | None:
        try:
            stored = (read_json(self.path) or {})[key]
            probes = tuple(Probe(**probe) for probe in stored.pop("probes"))
            return Found(**stored, probes=probes)
        except (KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, found: Found) -> None:
        try:
            known = read_json(self.path) or {}
            write_json(self.path, {**known, key: found.to_dict()}, shared=True)
        except StorageError:
            return
