"""The micro-batch: how many pairs go through the model at once.

Real forward and backward passes of the scenario at hand, doubling and then bisecting. On a
GPU a size fits if it ran. On a CPU the system would kill the process instead of refusing,
so memory is measured at small sizes, extrapolated, and only what safely fits is tried.

The largest size is not always the fastest, so the choice goes by the time per pair of a
whole step, counting the second forward pass that exact accumulation needs whenever the
micro-batch is smaller than the effective batch.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from clipft.cache import cache_folder
from clipft.data.loader import Batch
from clipft.errors import StorageError
from clipft.files import replacing
from clipft.modelling.adapt import TrainableModel
from clipft.training.losses import ContrastiveLoss
from clipft.training.memory import peak_memory, usable_memory
from clipft.training.precision import Precision

FALLBACK = 64
"""Where nothing can be measured."""

MAX_PROBES = 10
_GROWTH_THAT_PAYS = 1.05
_PREDICTION_MARGIN = 1.15
_SMALLEST = 4
_CLOSE_ENOUGH = 0.05


@dataclass(frozen=True)
class Probe:
    """One size that was tried. Seconds are of one pass over ``size`` pairs; memory in bytes."""

    size: int
    fits: bool
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    peak_bytes: int = 0

    def pairs_per_s(self, effective: int) -> float:
        """Training speed at an effective batch, its second forward pass included."""
        again = self.forward_seconds if self.size < effective else 0.0
        return self.size / (self.step_seconds + again)


@dataclass(frozen=True)
class Found:
    """``largest`` fits (``extrapolated``: by calculation, not by running); ``chosen`` is
    the fastest. Memory in bytes."""

    chosen: int
    largest: int
    extrapolated: bool
    usable_bytes: int
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrySize(Protocol):
    """Runs one size for real. ``fits`` False: the memory refused it."""

    def __call__(self, size: int) -> Probe: ...


def search(try_size: TrySize, effective: int, usable_bytes: int, refuses: bool) -> Found:
    """Find the micro-batch for an effective batch.

    ``refuses``: the device says when its memory is full, so a size may simply be tried.
    Otherwise nothing is tried whose extrapolated memory passes ``usable_bytes``.
    """
    probes: list[Probe] = []
    size = 1 if effective < _SMALLEST else _SMALLEST
    while len(probes) < MAX_PROBES:
        if not refuses and predict_bytes(probes, size) > usable_bytes:
            break
        probes.append(try_size(size))
        if not probes[-1].fits or size >= effective:
            break
        if not refuses and _levelled_off(probes, effective):
            break
        leap = refuses and 0 < predict_bytes(probes, size * 4) < usable_bytes
        size = min(size * (4 if leap else 2), effective)
    if refuses and not probes[-1].fits:
        _bisect(try_size, probes, usable_bytes)
    return _choose(probes, effective, usable_bytes, refuses)


def _bisect(try_size: TrySize, probes: list[Probe], usable_bytes: int) -> None:
    """Narrow between the largest size that fits and the smallest that does not, to 5 %.

    Memory grows as a line, so its extrapolation is tried before the middle.
    """
    while len(probes) < MAX_PROBES:
        fitting = sorted((p for p in probes if p.fits), key=lambda p: p.size)
        low = fitting[-1].size if fitting else 0
        high = min(p.size for p in probes if not p.fits)
        if high - low <= max(1, int(low * _CLOSE_ENOUGH)):
            return
        guess = _largest_predicted(fitting, high - 1, usable_bytes) if len(fitting) > 1 else 0
        if guess <= low and len(fitting) > 2:  # the line has been followed to its end
            guess = low + max(1, int(low * _CLOSE_ENOUGH))
        inside = low < guess < high
        probes.append(try_size(guess if inside else (low + high) // 2))


def _levelled_off(probes: list[Probe], effective: int) -> bool:
    if len(probes) < 3:
        return False
    now, before = probes[-1].pairs_per_s(effective), probes[-2].pairs_per_s(effective)
    return now < before * _GROWTH_THAT_PAYS


def predict_bytes(probes: Sequence[Probe], size: int) -> int:
    """Peak memory at ``size``: a line through the last two probes, its slope with a margin."""
    if len(probes) < 2:
        return 0
    a, b = probes[-2], probes[-1]
    slope = max(0.0, (b.peak_bytes - a.peak_bytes) / (b.size - a.size))
    return int(b.peak_bytes + slope * (size - b.size) * _PREDICTION_MARGIN)


def _choose(probes: list[Probe], effective: int, usable_bytes: int, refuses: bool) -> Found:
    fitting = [probe for probe in probes if probe.fits]
    if not fitting:
        return Found(1, 1, True, usable_bytes, tuple(probes))
    candidates = {p.size: p.pairs_per_s(effective) for p in fitting}
    largest = max(candidates)
    extrapolate = not refuses and largest < effective and len(probes) >= 2
    if extrapolate:
        largest = _largest_predicted(probes, effective, usable_bytes)
        if largest == effective:  # then nothing is computed twice
            last = fitting[-1]
            candidates[largest] = last.size / last.step_seconds
    chosen = max(candidates, key=lambda size: candidates[size])
    return Found(chosen, largest, extrapolate, usable_bytes, tuple(probes))


def _largest_predicted(probes: Sequence[Probe], effective: int, usable_bytes: int) -> int:
    low, high = probes[-1].size, effective
    while low < high:
        middle = (low + high + 1) // 2
        if predict_bytes(probes, middle) <= usable_bytes:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class ModelProbe:
    """Tries sizes on a real model with made-up pairs, captions at their longest."""

    model: TrainableModel
    loss: ContrastiveLoss
    image_size: int
    context_length: int
    precision: Precision

    def __call__(self, size: int) -> Probe:
        batch = self._batch(size).to(self.precision.device)
        self.model.train()
        try:
            with peak_memory(self.precision.device) as peak:
                self._step(batch)  # not timed: libraries set themselves up
                step_seconds = self._timed(lambda: self._step(batch))
            with torch.no_grad():
                forward_seconds = self._timed(lambda: self._embed(batch))
        except torch.OutOfMemoryError:
            return Probe(size, fits=False)
        finally:
            self.model.zero_grad(set_to_none=True)
            if self.precision.device.type == "cuda":
                torch.cuda.empty_cache()
        return Probe(size, True, step_seconds, forward_seconds, peak.bytes)

    def _batch(self, size: int) -> Batch:
        pixels = torch.zeros(size, 3, self.image_size, self.image_size, dtype=torch.uint8)
        ids = torch.ones(size, self.context_length, dtype=torch.int64)
        return Batch(pixels, ids, tuple(range(size)))

    def _embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with self.precision.autocast():
            embedded: tuple[torch.Tensor, torch.Tensor] = self.model(
                batch.pixel_values, batch.input_ids
            )
        return embedded

    def _step(self, batch: Batch) -> None:
        loss = self.loss(*self._embed(batch))
        if loss.requires_grad:
            torch.autograd.backward(loss)

    def _timed(self, work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if self.precision.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def find(probe: ModelProbe, effective: int, report: Callable[[Probe], None]) -> Found:
    """Measure on the probe's device, telling of each size tried."""
    device = probe.precision.device

    def reported(size: int) -> Probe:
        tried = probe(size)
        report(tried)
        return tried

    return search(reported, effective, usable_memory(device), refuses=device.type == "cuda")


class FoundCache:
    """What was found before, by model, scenario and machine. Losing it costs a search."""

    def __init__(self) -> None:
        self.path = cache_folder() / "batch_sizes.json"

    def get(self, key: str) -> Found | None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))[key]
            probes = tuple(Probe(**probe) for probe in stored.pop("probes"))
            return Found(**stored, probes=probes)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, found: Found) -> None:
        try:
            known = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
            with replacing(self.path, shared=True) as temporary:
                temporary.write_text(json.dumps({**known, key: found.to_dict()}), encoding="utf-8")
        except (OSError, ValueError, StorageError):
            return
