"""Defaults that follow the catalogue and the base model; what was set stays as it is."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.ablation.grid import Grid, plan_runs
from clipft.cli.app import run
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.core.errors import DataError
from clipft.data.order import EpochPlan
from clipft.data.shards.stream import ShardFolder
from clipft.distributed.collectives import Processes
from clipft.models.source import own_learning_rates
from clipft.training.defaults import (
    ENOUGH_STEPS,
    MOST_EPOCHS,
    PATIENT_STEPS,
    follow_catalogue,
    steps_for,
)
from tests.conftest import write_shard

BATCH_AND_EPOCHS = {"effective_batch_size", "epochs"}
FREE = {*BATCH_AND_EPOCHS, "patience"}


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "patience"),
    [
        (1_000_000, 1024, 10, 5),
        (50_000, 1024, 10, 5),
        (30_000, 1024, 10, 5),
        (29_000, 512, 10, 5),
        (921, 32, 11, 5),
        (381, 32, 25, 12),
        (128, 32, 75, 37),
        (40, 32, 100, 75),
        (20, 32, 100, 100),
        (1, 32, 100, 100),
    ],
)
def test_a_small_catalogue_gets_enough_steps(pairs, batch, epochs, patience):
    chosen = steps_for(Settings(), pairs, FREE)
    assert chosen == {"effective_batch_size": batch, "epochs": epochs, "patience": patience}


@given(st.integers(1, 200_000), st.sets(st.sampled_from(sorted(BATCH_AND_EPOCHS))))
def test_the_batch_is_no_smaller_than_the_steps_need(pairs, free):
    settings = Settings()
    chosen = steps_for(settings, pairs, free)
    batch, epochs = chosen["effective_batch_size"], chosen["epochs"]
    assert batch in {1024, 512, 256, 128, 64, 32} and 10 <= epochs <= MOST_EPOCHS
    for name in FREE - free:
        assert chosen[name] == getattr(settings, name)

    if free == BATCH_AND_EPOCHS and epochs < MOST_EPOCHS:
        assert steps(pairs, batch) * epochs >= ENOUGH_STEPS
    if batch < 1024:
        assert steps(pairs, batch * 2) * 10 < ENOUGH_STEPS
    if epochs > 10:
        assert steps(pairs, batch) * (epochs - 1) < ENOUGH_STEPS


@given(st.integers(1, 200_000), st.integers(1, 300), st.integers(2, 4096))
def test_half_of_enough_steps_do_not_end_a_run(pairs, epochs, batch):
    settings = Settings(epochs=epochs, effective_batch_size=batch)
    patience = steps_for(settings, pairs, {"patience"})["patience"]
    per_epoch = steps(pairs, batch)
    assert patience == 5 or patience == min(epochs, PATIENT_STEPS // per_epoch) > 5
    assert patience >= min(epochs, math.floor(PATIENT_STEPS / per_epoch))


def steps(pairs: int, batch: int) -> int:
    return EpochPlan(pairs, min(batch, pairs), min(batch, pairs), 0).steps


def test_a_run_that_is_never_stopped_needs_no_patience():
    assert steps_for(Settings(stop_on="never"), 40, FREE)["patience"] == 5


@pytest.fixture
def small(tmp_path):
    write_shard(tmp_path / "data" / "train" / "0.tar", range(40))
    return {"model": "tiny", "data_dir": tmp_path / "data", "output_dir": tmp_path / "runs"}


def test_what_is_chosen_is_said_with_the_options_that_set_it(small):
    said = list[str]()
    found = follow_catalogue(load_settings(small, environ={}), said.append)
    assert (found.values.effective_batch_size, found.values.epochs) == (32, 100)
    assert found.origins["epochs"] == found.origins["patience"] == "catalogue"
    assert found.values.lr == own_learning_rates("tiny")["dual_lora"]
    assert said == [
        "note: for 40 training pairs, this run uses --effective-batch-size 32, --epochs 100 and "
        "--patience 75 (200 steps in all). Set these options to choose yourself."
    ]
    assert follow_catalogue(found, said.append) == found and len(said) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epochs": "3"}, (32, 3, 5)),
        ({"effective_batch_size": "8"}, (8, 60, 30)),
        ({"effective_batch_size": "1024"}, (1024, 100, 100)),
        ({"effective_batch_size": "1024", "epochs": "10"}, (1024, 10, 10)),
        ({"patience": "2"}, (32, 100, 2)),
        ({"patience": "5"}, (32, 100, 5)),  # the default, but the user insists
        ({"lr": "1e-4"}, (32, 100, 75)),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_what_the_user_has_set_stays(small, given, expected, source, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("".join(f"{name} = {value}\n" for name, value in given.items()))
    loaded = {
        "flag": lambda: load_settings(small | given, environ={}),
        "environment": lambda: load_settings(
            small, environ={f"CLIPFT_{name.upper()}": value for name, value in given.items()}
        ),
        "file": lambda: load_settings(small, file, environ={}),
    }[source]()
    found = follow_catalogue(loaded, lambda note: None).values
    assert (found.effective_batch_size, found.epochs, found.patience) == expected
    assert found.lr == (1e-4 if "lr" in given else own_learning_rates("tiny")["dual_lora"])


def test_profiles_and_runs_without_training_are_left_alone(small):
    for more in ({"mini_train": True}, {"scenario": "zero_shot"}):
        loaded = load_settings(small | more, environ={})
        said = list[str]()
        found = follow_catalogue(loaded, said.append)
        assert found.values.epochs == loaded.values.epochs and not said
        assert found.values.effective_batch_size == loaded.values.effective_batch_size


def test_only_the_pairs_that_are_trained_on_count(small):
    write_shard(small["data_dir"] / "train" / "0.tar", range(200))
    loaded = load_settings(small | {"max_train_pairs": 128}, environ={})
    assert follow_catalogue(loaded, lambda note: None).values.epochs == 75


def test_a_stream_is_followed_as_well_wherever_its_shards_are(small, tmp_path):
    whole = follow_catalogue(load_settings(small, environ={}), lambda note: None).values
    streamed = load_settings(small | {"stream": True}, environ={})
    found = follow_catalogue(streamed, lambda note: None).values
    assert found == whole.model_copy(update={"stream": True})

    elsewhere = load_settings(small | {"stream": True, "data_dir": tmp_path / "no"}, environ={})
    source = ShardFolder(small["data_dir"] / "train")
    there = follow_catalogue(elsewhere, lambda note: None, source=source).values
    assert (there.effective_batch_size, there.epochs) == (32, 100)


def test_a_catalogue_without_pairs_is_refused(small, tmp_path):
    with pytest.raises(DataError):
        follow_catalogue(load_settings(small | {"data_dir": tmp_path}, environ={}), print)


@dataclass(eq=False)
class SecondMachine(Processes):
    """A process whose machine has no run folder; ``first`` is what rank zero sent."""

    first: Any = None

    def broadcast_object(self, value: Any) -> Any:
        return self.first


@dataclass(eq=False)
class FirstMachine(Processes):
    sent: Any = None

    def broadcast_object(self, value: Any) -> Any:
        self.sent = value
        return value


def test_the_first_process_chooses_for_those_on_other_machines(small, tmp_path):
    first = FirstMachine(0, 2)
    chosen = follow_catalogue(load_settings(small, environ={}), lambda note: None, first)
    empty = load_settings(small | {"data_dir": tmp_path / "elsewhere"}, environ={})
    second = SecondMachine(1, 2, first=first.sent)
    found = follow_catalogue(empty, lambda note: None, second).values
    assert found == chosen.values.model_copy(update={"data_dir": empty.values.data_dir})


def test_a_resumed_run_keeps_what_it_began_with(small):
    began = load_settings(small | {"epochs": 7, "patience": 6}, environ={})
    folder = began.values.run_dir
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(began.to_toml(), encoding="utf-8")
    (folder / "metrics.jsonl").touch()
    began.values.checkpoint_path.touch()

    def followed(**more: Any) -> tuple[int, int, int]:
        values = follow_catalogue(load_settings(small | more, environ={}), lambda note: None).values
        return values.effective_batch_size, values.epochs, values.patience

    assert followed(resume_from_checkpoint=True) == (1024, 7, 6)
    assert followed(resume_from_checkpoint=True, epochs=9) == (1024, 9, 6)
    assert followed() == (32, 100, 75)


def test_the_runs_of_an_ablation_follow_it_and_are_started_with_the_same_values(small):
    grid = Grid(["dual_lora", "full"], [1], {"epochs": [3, 200]})
    base = {"model": "tiny", "data_dir": small["data_dir"]}
    runs = plan_runs(grid, base, small["output_dir"])
    for planned in runs:
        found = follow_catalogue(planned.settings, lambda note: None)
        file = small["output_dir"] / "run.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(found.to_toml(), encoding="utf-8")
        said = list[str]()
        child = follow_catalogue(load_settings({}, file, environ={}), said.append).values
        assert child == found.values and not said
        assert child.epochs == planned.varied["epochs"]
        assert child.effective_batch_size == 32
        assert child.patience == (5 if child.epochs == 3 else 75)


@pytest.mark.slow
def test_the_batch_finder_searches_for_the_batch_of_training(small, capsys):
    data = str(small["data_dir"])
    given = ["--model", "tiny", "--device", "cpu", "--scenario", "linear_probe", "--data-dir", data]
    assert run(["find-batch-size", *given]) == 0
    said = capsys.readouterr().err
    assert f"The effective batch is 32, which suits the pairs in {data}." in said
    assert "--data-dir" in said.partition("clipft train")[2]


def test_the_batch_finder_refuses_a_folder_without_pairs(tmp_path, capsys):
    assert run(["find-batch-size", "--model", "tiny", "--data-dir", str(tmp_path / "typo")]) == 3
    assert "typo" in capsys.readouterr().err


def test_a_folder_may_bring_rates_and_other_contents_are_ignored(tmp_path):
    path = tmp_path / "clipft.json"
    for content, expected in (
        ({"learning_rates": {"full": 1e-5, "dual_lora": "fast"}}, {"full": 1e-5}),
        ({"learning_rates": {"full": math.nan, "dual_lora": -1, "text_lora": True}}, {}),
        ({"learning_rates": [1]}, {}),
        ([1, 2], {}),
    ):
        path.write_text(json.dumps(content))
        assert own_learning_rates(str(tmp_path)) == expected
    assert own_learning_rates(str(tmp_path / "nothing")) == {}


def test_the_rates_of_a_model_take_the_place_of_those_of_the_scenarios(small, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "clipft.json").write_text('{"learning_rates": {"full": 3e-6}}')
    for scenario, expected in (("full", 3e-6), ("linear_probe", SCENARIOS["linear_probe"].lr)):
        given = small | {"scenario": scenario, "model": str(tmp_path / "own")}
        found = follow_catalogue(load_settings(given, environ={}), lambda note: None)
        assert found.values.lr == expected
    assert Path(found.values.model).name == "own"


def test_the_packaged_model_has_a_rate_for_every_scenario_that_trains():
    trained = {name for name, scenario in SCENARIOS.items() if scenario.trains}
    assert set(own_learning_rates("tiny")) == trained
