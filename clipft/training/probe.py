"""Trying sizes of micro-batch on a real model, for the search of ``batch_size``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from clipft.config.settings import Settings
from clipft.core.memory import give_back, peak_memory, usable_memory
from clipft.data.loader import Batch
from clipft.data.positives import NO_GROUPS
from clipft.distributed.collectives import ALONE
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Towers, make_towers
from clipft.models.device import Precision
from clipft.models.pretrained import ModelInputs
from clipft.models.trainable import TrainableModel
from clipft.training.batch_size import SMALLEST, Found, Probe, search
from clipft.training.step.gradcache import ActivationBudget, ExactAccumulation, counting_saved
from clipft.training.step.losses import ContrastiveLoss, make_loss
from clipft.training.step.oom import memory_ran_out

_TIMED = 0.3
"""Seconds that a small size is repeated for: one pass is a poor clock."""
_PASSING = 2.0
"""The peak of a step as a factor on its graph: 1.6 was measured on ViT-B/32, 1.8 on the tiny
model."""
_ALL_GRAPHS = 1 << 60
_STATES = 2
"""Moments that AdamW keeps of each trainable weight, of its own size."""


@dataclass(frozen=True)
class ModelProbe:
    """Tries sizes on a real model with made-up pairs, captions at their longest. A step is that
    of training, its graph kept."""

    model: TrainableModel
    towers: Towers
    loss: ContrastiveLoss
    inputs: ModelInputs

    @property
    def precision(self) -> Precision:
        return self.towers.images.precision

    def __call__(self, size: int) -> Probe:
        self.model.train()
        probe = self._attempt(size)
        # Here: an error's frames hold the memory of the attempt
        self.model.zero_grad(set_to_none=True)
        give_back(self.precision.device)
        return probe

    def _attempt(self, size: int) -> Probe:
        try:
            batch = self._batch(size).to(self.precision.device)
            with peak_memory(self.precision.device) as peak:
                self.warm_up(batch)
                step_seconds = self._timed(lambda: self._step(batch))
            with torch.no_grad():
                forward_seconds = self._timed(lambda: self._embed(batch))
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            return Probe(size, fits=False)
        return Probe(size, True, step_seconds, forward_seconds, peak.bytes)

    def warm_up(self, batch: Batch) -> None:
        """Not timed: libraries set themselves up, on a GPU for each size anew."""
        if self.precision.device.type == "cuda" or len(batch) <= SMALLEST:
            self._step(batch)

    def bytes_per_pair(self) -> float:
        """What a pair more takes, about: the graph of one is counted, nothing large is run."""
        self.model.train()
        batch = self._batch(2).to(self.precision.device)
        with counting_saved() as saved:
            self._embed(batch)
        return sum(saved.values()) / len(batch) * _PASSING

    def _batch(self, size: int) -> Batch:
        image_size, length, end = (
            self.inputs.image_size,
            self.inputs.context_length,
            _end(self.inputs),
        )
        pixels = torch.zeros(size, 3, image_size, image_size, dtype=torch.uint8)
        ids = torch.arange(size)[:, None] // torch.tensor([1, 100])
        ids = torch.cat([torch.ones(size, length - 2, dtype=torch.int64), ids % 100 + 2], 1)
        ids = torch.where(ids == end, 1, ids)  # all different, and none filled
        return Batch(pixels, ids, tuple(range(size)))

    def _embed(self, batch: Batch) -> None:
        for tower in (self.towers.images, self.towers.texts):
            for chunk in tower.cut([batch]).chunks:
                tower.encode(0, chunk)

    def _step(self, batch: Batch) -> None:
        accumulate = ExactAccumulation(
            model=self.model,
            towers=self.towers,
            loss=self.loss,
            positives=NO_GROUPS,
            processes=ALONE,
            scaler=torch.amp.GradScaler(enabled=False),
            graphs=ActivationBudget(lambda: _ALL_GRAPHS),
        )
        accumulate(0, [batch])

    def _timed(self, work: Callable[[], Any]) -> float:
        """Seconds of one pass, the best of as many as there is time for."""
        best, began = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - began < _TIMED:
            started = time.perf_counter()
            work()
            if self.precision.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best


def _end(inputs: ModelInputs) -> int:
    return int(inputs.tokenizer.eos_token_id)


def find(
    probe: ModelProbe, effective: int, report: Callable[[Probe], None], processes: int = 1
) -> Found:
    """Measure on the probe's device, telling of each size tried. On a CPU ``processes`` share
    the memory."""
    device = probe.precision.device
    weights = sum(p.nbytes for _, p in probe.model.trainable())
    usable = usable_memory(device, sharers=processes) - _STATES * weights

    def reported(size: int) -> Probe:
        tried = probe(size)
        report(tried)
        return tried

    return search(reported, effective, usable, refuses=device.type == "cuda")


def probe_of(loaded: LoadedModel, settings: Settings) -> ModelProbe:
    """For ``loaded`` as it is: scenario, adapters, checkpointing."""
    inputs = loaded.base.inputs
    towers = make_towers(loaded, settings.seed, _end(inputs))
    return ModelProbe(loaded.model, towers, make_loss(settings, loaded.model), inputs)
