"""Tries sizes of the micro-batch on a real model, for the search in ``batch_size``."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from clipft.config.settings import Settings
from clipft.core.memory import MemoryBudget, give_back, peak_memory, usable_memory
from clipft.core.out_of_memory import memory_ran_out
from clipft.data.batch import Batch
from clipft.data.positives import NO_GROUPS
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Towers, make_towers
from clipft.models.pretrained import ModelInputs
from clipft.models.trainable import TrainableModel
from clipft.training.finder.batch_size import SMALLEST, Probe, SearchResult, search
from clipft.training.step.gradcache import ExactAccumulation
from clipft.training.step.losses import ContrastiveLoss, make_loss
from clipft.training.step.tower_pass import GraphMemory, counting_saved

# Seconds for which a small size is repeated, because a single pass is too short to measure
_TIMED = 0.3
# AdamW keeps two moments of each trainable weight, each of the weight's size
_STATES = 2


@dataclass(frozen=True)
class ModelProbe:
    """Runs training steps of a real model on made-up pairs, with captions of full length.

    All activation graphs are kept, as in a run that has room for them.
    """

    model: TrainableModel
    towers: Towers
    loss: ContrastiveLoss
    inputs: ModelInputs
    device: torch.device

    @classmethod
    def of(cls, loaded: LoadedModel, settings: Settings) -> "ModelProbe":
        """Make a probe of a model with its scenario, adapters and gradient checkpointing."""
        inputs = loaded.base.inputs
        towers = make_towers(loaded, settings.seed, int(inputs.tokenizer.eos_token_id))
        loss = make_loss(settings, loaded.model)
        return cls(loaded.model, towers, loss, inputs, loaded.precision.device)

    def __call__(self, size: int) -> Probe:
        """Try one size: a training step, and a forward pass alone."""
        self.model.train()
        probe = self._attempt(size)
        # Not in _attempt, because its frame and the frames of its error hold the memory
        self.model.zero_grad(set_to_none=True)
        give_back(self.device)
        return probe

    def _attempt(self, size: int) -> Probe:
        try:
            batch = self._batch(size)
            with peak_memory(self.device) as peak:
                # Warm up without timing: libraries initialize, on a GPU again for each size
                if self.device.type == "cuda" or size <= SMALLEST:
                    self._step(batch)
                step_seconds = self._timed(lambda: self._step(batch))
            with torch.no_grad():
                forward_seconds = self._timed(lambda: self._embed(batch))
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            return Probe(size, fits=False)
        graph_bytes = self.graph_bytes_per_pair
        return Probe(size, True, step_seconds, forward_seconds, peak.bytes, graph_bytes)

    @cached_property
    def graph_bytes_per_pair(self) -> float:
        """The bytes of the graph of a pair with a caption of full length, measured on two pairs."""
        self.model.train()
        batch = self._batch(2)
        with counting_saved() as saved:
            self._embed(batch)
        return sum(saved.values()) / len(batch)

    def _batch(self, size: int) -> Batch:
        length = self.inputs.context_length
        pixels = self.inputs.blank_images(size)
        # All captions different, so that each is encoded, and none with padding
        ids = torch.arange(size)[:, None] // torch.tensor([1, 100])
        ids = torch.cat([torch.ones(size, length - 2, dtype=torch.int64), ids % 100 + 2], 1)
        ids = torch.where(ids == int(self.inputs.tokenizer.eos_token_id), 1, ids)
        return Batch(pixels, ids, tuple(range(size)))

    def _embed(self, batch: Batch) -> None:
        for tower in (self.towers.images, self.towers.texts):
            for chunk in tower.make_chunks([batch]).chunks:
                tower.encode(0, chunk)

    def _step(self, batch: Batch) -> None:
        accumulate = ExactAccumulation(
            model=self.model,
            towers=self.towers,
            loss=self.loss,
            positives=NO_GROUPS,
            scaler=torch.amp.GradScaler(enabled=False),
            graphs=GraphMemory(lambda: MemoryBudget(math.inf)),
        )
        accumulate(0, [batch])

    def _timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds of one pass: the shortest of all passes that there is time for."""
        best, began = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - began < _TIMED:
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best


def measure(
    probe: ModelProbe, effective: int, report: Callable[[Probe], None], processes: int = 1
) -> SearchResult:
    """Search on the probe's device, and report each size that is tried.

    On a CPU, ``processes`` processes share the memory.
    """
    weights = sum(p.nbytes for _, p in probe.model.trainable())
    usable = usable_memory(probe.device, sharers=processes) - _STATES * weights

    def reported(size: int) -> Probe:
        tried = probe(size)
        report(tried)
        return tried

    return search(reported, effective, usable, device_refuses=probe.device.type == "cuda")
