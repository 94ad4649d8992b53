"""What a run sees is a function of the pairs and the seed: not of workers, processes,
micro-batches, the cut into shards, nor of how often it was killed. Over real shards, images
and captions."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipft.data.batch import StepBatch
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import SOLE_PROCESS, EpochPlan, Share
from clipft.data.shards.folders import open_pairs
from clipft.training.state import TrainState
from tests import inputs
from tests.faults.helpers import encoded, write_tar

Kills = dict[int, bool]
"""Maps numbers of steps to whether the run is killed right then, or else during the next step."""


@dataclass(frozen=True)
class Run:
    """``cuts``: the numbers of the pairs that begin another shard."""

    pairs: int
    cuts: frozenset[int]
    bad: frozenset[int]
    effective: int
    micro: int
    epochs: int
    seed: int
    workers: int = 0
    share: Share = SOLE_PROCESS

    @property
    def plan(self) -> EpochPlan:
        return EpochPlan(self.pairs, min(self.effective, self.pairs), self.micro, self.seed)

    @property
    def steps(self) -> int:
        return self.plan.steps * self.epochs


@st.composite
def runs(draw: st.DrawFn, workers: int = 0) -> Run:
    pairs = draw(st.integers(1, 24))
    numbers = st.frozensets(st.integers(0, pairs - 1), max_size=6)
    return Run(
        pairs,
        cuts=draw(numbers),
        bad=draw(numbers),
        effective=draw(st.integers(2, 12)),
        micro=draw(st.integers(1, 12)),
        epochs=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 3)),
        workers=draw(st.integers(1, workers)) if workers else 0,
    )


@st.composite
def killed_runs(draw: st.DrawFn, workers: int = 0) -> tuple[Run, Kills]:
    run = draw(runs(workers))
    kills = st.dictionaries(st.integers(0, run.steps), st.booleans(), max_size=2 if workers else 6)
    return run, draw(kills)


@cache
def preprocessing(seed: int) -> Preprocessing:
    return inputs.preprocessing(side=8, seed=seed)


@cache
def image(number: int) -> bytes:
    ramp = Image.linear_gradient("L").resize((11, 9)).convert("RGB")
    return encoded(Image.blend(ramp, Image.new("RGB", (11, 9), (number * 9, 50, 0)), 0.5), "PNG")


def write_shards(folder: Path, run: Run) -> None:
    shards: list[list[tuple[str, bytes]]] = [[]]
    for number in range(run.pairs):
        if number in run.cuts and shards[-1]:
            shards.append([])
        data = b"broken" if number in run.bad else image(number)
        caption = f"pair {number}" + " more" * (number % 3)
        shards[-1] += [(f"{number:03d}.png", data), (f"{number:03d}.txt", caption.encode())]
    for number, members in enumerate(shards):
        write_tar(folder / f"{number:05d}.tar", members)


@patch("os.cpu_count", lambda: 8)  # 3 workers are 3 everywhere
def steps_of(run: Run, kills: Kills | None = None) -> list[StepBatch]:
    """Return the steps that a run counts from its start to its end, across all its kills."""
    with tempfile.TemporaryDirectory() as name:
        folder, done = Path(name), list[StepBatch]()
        write_shards(folder, run)
        state = TrainState(None, None, run.plan.steps)  # type: ignore[arg-type]
        for stop, under_way in [*sorted((kills or {}).items()), (run.steps, False)]:
            batches = training_batches(
                open_pairs(folder),
                preprocessing(run.seed),
                run.plan,
                state.position,
                run.epochs,
                LoaderOptions(run.workers, share=run.share),
            )
            while state.step < stop:
                done.append(next(batches))
                state.advance(done[-1], 0.0)
            if under_way:  # fetched, but neither counted nor recorded
                next(batches, None)
        assert next(batches, None) is None
        return done


def batches_of(steps: Iterable[StepBatch]) -> list[tuple[object, ...]]:
    """Return each step and its micro-batches, for comparison bit by bit."""
    return [
        (
            (step.epoch, step.step, step.skipped),
            [
                (b.numbers, b.pixel_values.tolist(), b.input_ids.tolist())
                for b in step.micro_batches
            ],
        )
        for step in steps
    ]


def pairs_of(steps: Iterable[StepBatch]) -> list[tuple[object, ...]]:
    """Return the pairs in their order, regardless of micro-batches and padding."""
    end = preprocessing(0).captions.pad_token_id
    return [
        (step.epoch, step.step, number, pixels.tolist(), ids.tolist()[: ids.tolist().index(end)])
        for step in steps
        for b in step.micro_batches
        for number, pixels, ids in zip(b.numbers, b.pixel_values, b.input_ids, strict=True)
    ]


def each_epoch_sees_every_good_pair_once(run: Run) -> None:
    steps = steps_of(run)
    assert len(steps) == run.steps
    for epoch in range(run.epochs):
        mine = [step for step in steps if step.epoch == epoch]
        seen = [n for step in mine for batch in step.micro_batches for n in batch.numbers]
        skipped_keys = [int(skipped.key) for step in mine for skipped in step.skipped]
        assert sorted(seen) == sorted(set(range(run.pairs)) - run.bad)
        assert sorted(skipped_keys) == sorted(run.bad)


def kills_change_nothing(run: Run, kills: Kills) -> None:
    assert batches_of(steps_of(run, kills)) == batches_of(steps_of(replace(run, workers=0)))


def processes_together_see_what_one_sees(run: Run, processes: int) -> None:
    """The micro-batches of all processes, in turn, are those of a single process."""
    parts = [steps_of(replace(run, share=Share(rank, processes))) for rank in range(processes)]
    assert {len(part) for part in parts} == {run.steps}  # nobody waits for another
    together = [
        StepBatch(
            of_all[0].epoch,
            of_all[0].step,
            [batch for part in of_all for batch in part.micro_batches],
            [skipped for part in of_all for skipped in part.skipped],
            sum(part.pairs for part in of_all),
        )
        for of_all in zip(*parts, strict=True)
    ]
    alone = steps_of(replace(run, workers=0))
    assert batches_of(together) == batches_of(alone)
    assert [step.pairs for step in together] == [step.pairs for step in alone]


def neither_micro_batches_nor_shards_change_the_order(run: Run, other: Run) -> None:
    same = replace(run, micro=other.micro, cuts=other.cuts, workers=other.workers)
    assert pairs_of(steps_of(same)) == pairs_of(steps_of(run))


PROPERTIES = (
    (each_epoch_sees_every_good_pair_once, lambda workers: (runs(workers),)),
    (kills_change_nothing, lambda workers: (killed_runs(workers),)),
    (processes_together_see_what_one_sees, lambda w: (st.tuples(runs(w), st.integers(2, 5)),)),
    (neither_micro_batches_nor_shards_change_the_order, lambda w: (runs(), runs(w))),
)
properties = pytest.mark.parametrize(
    ("check", "arguments"), PROPERTIES, ids=[check.__name__ for check, _ in PROPERTIES]
)


def hold(check, arguments, examples: int) -> None:
    """Run ``check`` on ``examples`` random draws of ``arguments``."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*arguments))
    def tried(values) -> None:
        check(*(values[0] if isinstance(values[0], tuple) else values))

    tried()


@properties
def test_in_the_main_process(check, arguments):
    hold(check, arguments(0), 40)


@properties
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_with_worker_processes(check, arguments):
    hold(check, arguments(3), 8)


@pytest.mark.slow
@properties
@pytest.mark.parametrize(("workers", "examples"), [(0, 1500), (3, 150)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_many_more(check, arguments, workers, examples):
    hold(check, arguments(workers), examples)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("under_way", [False, True], ids=["between-steps", "within-a-step"])
def test_five_kills_in_one_epoch(workers, under_way):
    run = Run(24, frozenset({7, 8}), frozenset({3, 19}), 4, 3, 2, seed=1, workers=workers)
    kills_change_nothing(run, dict.fromkeys([0, 1, 2, 4, 5], under_way))


def test_another_seed_is_another_order():
    run = Run(12, frozenset(), frozenset(), 4, 4, 1, seed=1)
    one, other = steps_of(run), steps_of(replace(run, seed=2))
    assert [b.numbers for s in one for b in s.micro_batches] != [
        b.numbers for s in other for b in s.micro_batches
    ]
