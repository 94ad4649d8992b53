"""Short runs, with whole or sharded weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipft.config.sources import load_settings
from clipft.distributed.collectives import Processes
from clipft.embedding.embed import embed_pairs
from clipft.runs.records import StepResult
from clipft.training.loop import find_look_alikes, fit
from clipft.training.prepare import prepare
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState

SMALL = {
    **{"model": "tiny", "scenario": "full", "device": "cpu", "precision": "fp32", "epochs": 2},
    **{"effective_batch_size": 20, "micro_batch_size": 5, "num_workers": 0, "max_bad": 0.2},
}


@dataclass
class Run:
    """A setup and its state; ``given`` are settings on top of ``SMALL``."""

    setup: RunSetup
    state: TrainState

    @classmethod
    def of(cls, given: dict[str, Any], processes: Processes) -> "Run":
        settings = load_settings({**SMALL, **given}, environ={}).values
        setup = prepare(settings, lambda note: None, processes)
        return cls(setup, setup.make_state())

    def train(self) -> list[float]:
        """Losses, gradient norms and, with --preserve, drifts of the steps that are left."""
        accumulate = self.setup.make_accumulation(self.state.optimizer, lambda note: None)
        done = list[StepResult]()
        while self.state.position.epoch < self.setup.plan.epochs:
            find_look_alikes(self.setup, self.state)
            position, look_alikes = self.state.position, self.state.look_alikes
            batches = self.setup.step_batches(position, look_alikes=look_alikes)
            done += fit(self.state, batches, accumulate)
        told = [figure for step in done for figure in (step.loss, step.grad_norm, step.drift)]
        return [figure for figure in told if figure is not None]

    def validation_loss(self) -> float:
        setup = self.setup
        how = (setup.val_encoding, setup.settings, setup.val_positives, setup.processes)
        return setup.validation_loss(embed_pairs(setup.loaded, setup.val, *how))

    def held_bytes(self) -> int:
        """Bytes of the weights, while no tower runs, and of AdamW's two states."""
        weights = sum(self._own(p).nbytes for _, p in self.state.model.trainable())
        states = self.state.optimizer.adamw.state.values()
        return weights + sum(s[name].nbytes for s in states for name in ("exp_avg", "exp_avg_sq"))

    def _own(self, parameter: Any) -> torch.Tensor:
        local: torch.Tensor = getattr(parameter, "to_local", lambda: parameter)()
        return local


def figures(given: dict[str, Any], processes: Processes, left: Path) -> dict[str, Any]:
    """The figures of a whole run, whose state is saved as ``left``."""
    run = Run.of(given, processes)
    before = run.validation_loss()
    told = [before, *run.train(), run.validation_loss()]
    state = run.state.state_dict()
    if processes.rank == 0:
        torch.save(state, left)
    return {"told": told, "bytes": run.held_bytes()}
