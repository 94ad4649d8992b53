"""A training that takes no time: its recall is a function of the settings.

It reports epochs, leaves a result and a checkpoint, and continues from that, as a real run does.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings, load_settings
from clipft.core.common import Note
from clipft.models.source import own_learning_rates
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks, EpochResult, Plan, StepResult
from clipft.training.signals import StopRequest
from clipft.training.state import TrainResult
from clipft.tune.budget import Budget
from clipft.tune.confirm import Measured
from clipft.tune.search import Search
from clipft.tune.space import SEARCHED, Space
from clipft.tune.study import SearchStudy

RATE = own_learning_rates("tiny")["dual_lora"]
"""The learning rate of a run in which nothing is set."""


class Killed(BaseException):
    """What ``kill -9`` would do to the process."""


def hill(settings: Settings) -> float:
    """The best recall is 40%, at four times the default rate with adapters on all layers."""
    rate = math.log2(settings.lr / RATE) - 2
    targets = {"qv": 0.06, "qkvo": 0.04, "mlp": 0.02, "all": 0.0}[settings.lora_targets]
    scenario = 0.0 if settings.scenario == "dual_lora" else 0.1
    return 0.4 - 0.01 * rate**2 - targets - scenario - 0.1 * abs(settings.lora_dropout - 0.3)


def retrieval(recall: float) -> dict[str, Any]:
    one = {"r@1": recall, "r@5": recall, "r@10": recall, "median_rank": 3.0, "mrr": 0.5}
    return {"text_to_image": one, "image_to_text": one, "pairs": 40}


def a_plan(settings: Settings) -> Plan:
    return Plan(
        **{"scenario": settings.scenario, "model": "tiny", "parameters": "", "val_pairs": 40},
        **{"trainable_parameters": 10, "train_pairs": 100, "epochs": settings.epochs},
        **{"steps_per_epoch": 3, "warmup_steps": 1, "effective_batch_size": 32},
        **{"micro_batch_size": 32, "device": "cpu", "precision": "fp32", "optimizer": "adamw"},
    )


@dataclass
class StandIn:
    """Trains nothing. ``before_epoch`` is called with the settings and the number of each epoch."""

    recall: Callable[[Settings], float] = hill
    before_epoch: Callable[[Settings, int], None] = lambda settings, epoch: None
    seconds: float = 0.0
    trained: list[Settings] = field(default_factory=list)

    def __call__(self, loaded: LoadedSettings, callbacks: Callbacks) -> TrainResult:
        settings, told = loaded.values, callbacks.callback
        if loaded.is_default("lr"):  # as ``clipft.api.train`` follows the model
            settings = settings.model_copy(update={"lr": RATE})
        self.trained.append(settings)
        paths = RunPaths(settings.run_dir)
        paths.folder.mkdir(parents=True, exist_ok=True)
        done = json.loads(paths.checkpoint.read_text()) if paths.checkpoint.exists() else 0
        before = EpochResult(0, 0, None, 3.0, retrieval(0.2))
        told.started(a_plan(settings), 3 * done)
        try:
            for epoch in range(done + 1, settings.epochs + 1):
                self.before_epoch(settings, epoch)
                time.sleep(self.seconds)
                told.stepped(a_step(epoch))
                told.epoch_ended(self.epoch(settings, epoch))
                paths.checkpoint.write_text(json.dumps(epoch))
        finally:
            told.closed()
        best = self.epoch(settings, settings.epochs)
        paths.best.write_text("weights")
        result = TrainResult(
            before, best, 3 * settings.epochs, False, 0, paths.folder, paths.checkpoint
        )
        paths.result.write_text(json.dumps(result.to_dict()))
        return result

    def epoch(self, settings: Settings, epoch: int) -> EpochResult:
        share = 1 - math.exp(-3 * epoch / settings.epochs)
        return EpochResult(epoch, 3 * epoch, 1.0, 1.0, retrieval(share * self.recall(settings)))


def a_step(epoch: int) -> StepResult:
    return StepResult(
        epoch=epoch,
        step=3 * epoch,
        loss=1.0,
        lr=1e-3,
        grad_norm=1.0,
        pairs=32,
        seconds=0.1,
        data_seconds=0.0,
        applied=True,
    )


def a_space(names: tuple[str, ...] = SEARCHED, captions: tuple[str, ...] = (), **given) -> Space:
    """The space of a search on 500 pairs, from settings that the user has given."""
    given = {"model": "tiny", "epochs": 6, "effective_batch_size": 32, **given}
    rate = {"lr": RATE} if given.get("scenario", "dual_lora") != "zero_shot" else {}
    base = load_settings({**rate, **given}, environ={})
    names = tuple(n for n in names if n not in given and (n != "caption" or captions))
    return Space(base, given, names, 500, captions)


def a_search(
    folder: Path,
    train: StandIn,
    budget: str = "12",
    seeds: int = 3,
    space: Space | None = None,
    note: Note = lambda text: None,
    stop: StopRequest | None = None,
) -> Search:
    folder.mkdir(parents=True, exist_ok=True)
    space = space or a_space(data_dir=folder / "data")
    study = SearchStudy(folder, space, 42)
    study.begin({"searched": ", ".join(space.names)})
    seconds = range(42, 42 + seeds)
    return Search(study, Budget.parse(budget), seconds, train, note, stop or StopRequest())


def open_pairs(recall_of: Callable[[Path | None], float] | None = None):
    """Measures runs by their result, or by ``recall_of``, with some noise over the queries."""

    def opened(settings: Settings, split: str):
        def measure(folder: Path | None) -> Measured:
            recall = 0.2
            if recall_of:
                recall = recall_of(folder)
            elif folder:
                after = json.loads(RunPaths(folder).result.read_text())["after"]
                recall = after["text_to_image"]["r@1"]
            noise = np.random.default_rng(1).normal(0, 0.01, 200)
            return Measured(recall, recall + noise)

        return measure

    return opened


def no_soup(folders, target, settings, note):
    """No run improves the best one."""
