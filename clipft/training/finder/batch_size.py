"""The search for the micro-batch: how many pairs pass through the model at once.

Memory grows linearly with the size, so the largest size that fits can be extrapolated from a few
small sizes. On a GPU any size can be tried, because a GPU reports that its memory is full. On a CPU
the system might kill the process instead, so only sizes are tried that fit by extrapolation.

The largest size is not always the fastest. The size is chosen by the time per pair of a whole step,
including the second forward pass of the pairs whose graphs do not fit in memory.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipft.core.cache import cache_folder
from clipft.core.errors import StorageError
from clipft.core.files import read_json, write_json
from clipft.core.memory import MemoryBudget

MAX_PROBES = 10
SMALLEST = 4
# On a CPU, no larger sizes are tried when doubling the size gains less than 5% of speed
_GROWTH_THAT_PAYS = 1.05
# Of two sizes this close in speed, the smaller one is chosen, because it takes less memory
_AS_FAST = 1.02
# Share of the usable memory that the chosen size may take: a run needs more than a single step
_EASY = 0.9
# Factors on the slope of memory: beyond twice the largest size tried, and up to there
_FAR, _NEAR = 1.15, 1.02
_CLOSE_ENOUGH = 0.04
# A guess this close to a size that fits is not worth trying
_ON_THE_LINE = 1.01
# Seconds that a size may take on a CPU if it is tried only to find the largest size
_PATIENCE = 90.0


@dataclass(frozen=True)
class Probe:
    """One size that was tried. Seconds are for one pass over ``size`` pairs, memory in bytes."""

    size: int
    fits: bool
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    peak_bytes: int = 0
    graph_bytes_per_pair: float = 0.0

    def pairs_per_s(self, effective: int, kept: float = 0.0) -> float:
        """Return the training speed at an effective batch.

        With several micro-batches, all pairs but the share ``kept`` need a second forward pass.
        """
        again = self.forward_seconds * (1 - kept) if self.size < effective else 0.0
        return self.size / (self.step_seconds + again)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    ``largest`` is the largest size that fits in memory (if ``extrapolated``, by calculation);
    ``chosen`` is the fastest and leaves ``left_bytes`` of ``usable_bytes`` free. ``kept`` is the
    share of the effective batch whose graphs fit in memory.
    """

    chosen: int
    largest: int
    extrapolated: bool
    usable_bytes: int
    probes: tuple[Probe, ...]
    left_bytes: int = 0
    kept: float = 0.0

    def speed(self, effective: int) -> float:
        """Pairs per second of ``chosen``; 0 if no size fitted."""
        chosen = [p for p in self.probes if p.size == self.chosen]
        return max((p.pairs_per_s(effective, self.kept) for p in chosen), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


TrySize = Callable[[int], Probe]
"""Runs a step with one size. If memory runs out, the probe does not fit."""


def search(
    try_size: TrySize, effective: int, usable_bytes: int, device_refuses: bool
) -> SearchResult:
    """Find the micro-batch for an effective batch, with at most ``MAX_PROBES`` sizes tried.

    ``device_refuses``: the device reports when its memory is full, so any size may be tried.
    Otherwise only sizes are tried whose extrapolated memory is within ``usable_bytes``.
    """
    sizes = _Search(try_size, effective, usable_bytes, device_refuses)
    sizes.grow()
    sizes.approach_the_limit()
    return sizes.result()


@dataclass
class _Search:
    try_size: TrySize
    effective: int
    usable_bytes: int
    device_refuses: bool
    probes: list[Probe] = field(default_factory=list)

    @property
    def fitting(self) -> list[Probe]:
        return sorted((p for p in self.probes if p.fits), key=lambda p: p.size)

    def bounds(self) -> tuple[int, int]:
        """Return the largest size known to fit (0: none), and the smallest known not to fit."""
        low = max((p.size for p in self.probes if p.fits), default=0)
        return low, min([p.size for p in self.probes if not p.fits] + [self.effective + 1])

    def grow(self) -> None:
        """Try larger and larger sizes, until memory runs out or speed levels off."""
        size = min(SMALLEST, self.effective)
        while len(self.probes) < MAX_PROBES:
            if not self.device_refuses and self.bytes_at(size) > self.usable_bytes:
                return
            self.probes.append(self.try_size(size))
            if not self.probes[-1].fits or size >= self.effective:
                return
            if not self.device_refuses and len(self.probes) >= 3:
                now, before = (p.pairs_per_s(self.effective) for p in self.probes[:-3:-1])
                if now < before * _GROWTH_THAT_PAYS:
                    return
            leap = self.device_refuses and 0 < self.bytes_at(size * 4) < self.usable_bytes
            size = min(size * (4 if leap else 2), self.effective)

    def approach_the_limit(self) -> None:
        """Narrow the gap between the largest size that fits and the smallest that does not."""
        while len(self.probes) < MAX_PROBES:
            low, high = self.bounds()
            if high - low <= max(1, int(low * _CLOSE_ENOUGH)):
                return
            guess = self.limit() if len(self.fitting) > 1 else (low + high) // 2
            if guess <= low * _ON_THE_LINE:  # go beyond the extrapolation only if it is harmless
                guess = low + max(1, int(low * _CLOSE_ENOUGH)) if self.device_refuses else low
            if not low < guess < high:
                return
            if not self.device_refuses and self.fitting:
                largest = self.fitting[-1]
                per_pair = (largest.step_seconds + largest.forward_seconds) / largest.size
                if guess * per_pair > _PATIENCE:
                    return
            self.probes.append(self.try_size(guess))

    def result(self) -> SearchResult:
        """Choose by speed among the sizes that leave some memory free."""
        if not self.fitting:
            return SearchResult(1, 1, True, self.usable_bytes, tuple(self.probes))
        (largest, _), limit = self.bounds(), self.limit(far=_NEAR)
        extrapolated = not self.device_refuses and limit > largest * (1 + _CLOSE_ENOUGH)
        easy = [p for p in self.fitting if p.peak_bytes <= self.usable_bytes * _EASY]
        speeds = [
            (p.pairs_per_s(self.effective, self.kept(p)), p) for p in easy or self.fitting[:1]
        ]
        best = max(speed for speed, _ in speeds)
        chosen = next(probe for speed, probe in speeds if speed * _AS_FAST >= best)
        return SearchResult(
            chosen.size,
            limit if extrapolated else largest,
            extrapolated,
            self.usable_bytes,
            tuple(self.probes),
            max(0, self.usable_bytes - chosen.peak_bytes),
            self.kept(chosen),
        )

    def kept(self, probe: Probe) -> float:
        """Return the share of the graphs of an effective batch that a step keeps at this size."""
        fixed = probe.peak_bytes - self.slope() * probe.size  # weights and their gradients
        device = "cuda" if self.device_refuses else "cpu"
        budget = MemoryBudget.of(self.usable_bytes - fixed, device)
        return budget.kept(probe.size, self.effective, probe.graph_bytes_per_pair)

    def slope(self) -> float:
        """Return the bytes per pair, by the largest fitting size and one at most 80% as large."""
        largest = self.fitting[-1]
        other = next((p for p in reversed(self.fitting) if p.size <= largest.size * 0.8), None)
        if other is None:
            return 0.0
        return max(0.0, (largest.peak_bytes - other.peak_bytes) / (largest.size - other.size))

    def bytes_at(self, size: int, far: float = _FAR) -> int:
        """Return the extrapolated peak memory at ``size``, with a margin; 0 if it is unknown."""
        if len(self.fitting) < 2:
            return 0
        largest = self.fitting[-1]
        margin = _NEAR if size <= largest.size * 2 else far
        return int(largest.peak_bytes + self.slope() * (size - largest.size) * margin)

    def limit(self, far: float = _FAR) -> int:
        """Return the largest size whose extrapolated memory fits, below sizes that did not fit."""
        low, high = self.bounds()
        high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes_at(middle, far) <= self.usable_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def result_cache() -> Path:
    """Return the file with earlier results, by model, scenario and machine. It may be deleted."""
    return cache_folder() / "batch_sizes.json"


def cached_result(key: str) -> SearchResult | None:
    """Return the result of an earlier search with this key, if the file can be read."""
    try:
        stored = (read_json(result_cache()) or {})[key]
        probes = tuple(Probe(**probe) for probe in stored.pop("probes"))
        return SearchResult(**stored, probes=probes)
    except (KeyError, TypeError, AttributeError):
        return None


def keep_result(key: str, found: SearchResult) -> None:
    """Keep a result for later runs, if the cache folder can be written."""
    path = result_cache()
    try:
        write_json(path, {**(read_json(path) or {}), key: found.to_dict()}, shared=True)
    except StorageError:
        return
