"""Fifty steps of a run against a plain loop with one big batch, the loss of transformers' own
model and torch's AdamW. Processes: tests/e2e/test_many_processes.py."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.data.batch import Batch, StepBatch
from clipft.data.captions.tokenizer import stacked
from clipft.data.loader import training_batches
from clipft.data.order import Position
from clipft.distributed.collectives import ALONE
from clipft.training.loop import fit
from clipft.training.prepare import prepare
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState

EFFECTIVE, STEPS = 28, 50
TRAINED = [name for name, scenario in SCENARIOS.items() if scenario.trains]


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    weights: dict[str, torch.Tensor]


def setup_of(data: Path, micro: int, **given: object) -> RunSetup:
    flags = {
        "model": "tiny",
        "data_dir": str(data),
        "effective_batch_size": EFFECTIVE,
        "micro_batch_size": micro,
        "precision": "fp32",
        "device": "cpu",
        "num_workers": 0,
        "warmup_steps": 5,
        "lr": 1e-4,  # ten times that, and AdamW makes steps of rounding
        **given,
    }
    return prepare(load_settings(flags, environ={}).values, lambda note: None, ALONE)


def steps_of(setup: RunSetup) -> list[StepBatch]:
    how, plan = setup.encoding.preprocessing, setup.epoch_plan
    epochs = setup.settings.epochs
    batches = training_batches(setup.train, how, plan, Position(), epochs, setup.loader_options)
    return list(batches)


def ours(data: Path, micro: int, **given: object) -> Trained:
    setup = setup_of(data, micro, **given)
    model = setup.loaded.model
    state = TrainState(model, setup.make_optimizer(), setup.epoch_plan.steps)
    accumulate = setup.make_accumulation(state.optimizer, print)
    losses = [result.loss for result in fit(state, steps_of(setup), accumulate)]
    return Trained(losses, model.trainable_state())


def plain(data: Path, **given: object) -> Trained:
    """The plain loop: only the model, the order and the pixels come from clipft."""
    setup = setup_of(data, EFFECTIVE, feature_cache=False, lora_dropout=0, **given)
    model, settings, batches = setup.loaded.model, setup.settings, steps_of(setup)
    matrices = [p for _, p in model.trainable() if p.ndim >= 2]
    others = [p for _, p in model.trainable() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.wd},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=settings.lr,
        total_steps=len(batches) + 1,
        pct_start=setup.plan.warmup_steps / (len(batches) + 1),
        cycle_momentum=False,
    )
    losses, model = [], model.train()
    for batch in batches:
        loss = big_loss(setup, batch.micro_batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, settings.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
        losses.append(loss.item())
    return Trained(losses, model.trainable_state())


def big_loss(setup: RunSetup, micro_batches: list[Batch]) -> torch.Tensor:
    inputs, clip = setup.loaded.base.inputs, setup.loaded.model.clip
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (inputs.mean, inputs.std))
    pixels = torch.cat([b.pixel_values for b in micro_batches]).float() / 255
    ids = stacked([b.input_ids for b in micro_batches], int(inputs.tokenizer.eos_token_id), 0)
    out = clip(input_ids=ids, pixel_values=(pixels - mean) / std, return_loss=True)
    return out.loss


def assert_same(found: Trained, expected: Trained) -> None:
    assert len(found.losses) == len(expected.losses) >= 2
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.fixture(scope="module")
def references():
    """The plain runs, each made once and compared with several others."""
    return {}


# 96 pairs are 4 steps an epoch, the last of 12 pairs
LENGTHS = [pytest.param(2, id="8 steps"), pytest.param(13, marks=pytest.mark.slow, id="52 steps")]


def pairs(scenarios: list[str], sizes: list[int]) -> list[object]:
    """Each scenario with each size, of which some for all but the usual scenario are slow."""
    found = [(s, size) for s in scenarios for size in sizes]
    quick = [s == "dual_lora" or i % 2 == i // len(sizes) % 2 for i, (s, _) in enumerate(found)]
    marks = ((), pytest.mark.slow)
    return [pytest.param(*p, marks=marks[not q]) for p, q in zip(found, quick, strict=True)]


@pytest.mark.parametrize("epochs", LENGTHS)
@pytest.mark.parametrize(("scenario", "micro"), pairs(TRAINED, [28, 14, 7, 4]))
def test_a_run_is_the_plain_loop(scenario, micro, epochs, catalogue, references):
    given = {"scenario": scenario, "epochs": epochs}
    key = (scenario, epochs)
    if key not in references:
        references[key] = plain(catalogue, **given)
    assert_same(ours(catalogue, micro, lora_dropout=0, **given), references[key])


@pytest.mark.parametrize("epochs", LENGTHS)
@pytest.mark.parametrize(
    ("scenario", "micro"), pairs([n for n in TRAINED if SCENARIOS[n].lora], [14, 7, 4])
)
def test_with_dropout_it_is_the_run_in_one_graph(scenario, micro, epochs, catalogue, references):
    given = {"scenario": scenario, "epochs": epochs, "lora_dropout": 0.2}
    key = (scenario, epochs, "dropout")
    if key not in references:
        references[key] = ours(catalogue, EFFECTIVE, **given)
    assert_same(ours(catalogue, micro, graph_memory=0, **given), references[key])
