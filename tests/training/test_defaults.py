"""Defaults that follow the catalogue and the base model; what was set stays as it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.data.order import EpochPlan
from clipft.models.pretrained import own_learning_rates
from clipft.training import defaults
from clipft.training.defaults import ENOUGH_STEPS, follow_catalogue, steps_for
from tests.conftest import write_shard

FREE = {"effective_batch_size", "epochs"}


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs"),
    [
        (50_000, 1024, 10),
        (30_000, 1024, 10),
        (29_000, 512, 10),
        (921, 32, 11),
        (381, 32, 25),
        (128, 32, 75),
        (20, 32, 100),
    ],
)
def test_a_small_catalogue_gets_enough_steps(pairs, batch, epochs):
    chosen = steps_for(Settings(), pairs, FREE)
    assert chosen == {"effective_batch_size": batch, "epochs": epochs}


@given(st.integers(1, 200_000), st.sets(st.sampled_from(sorted(FREE))))
def test_the_batch_is_no_smaller_than_the_steps_need(pairs, free):
    settings = Settings()
    chosen = steps_for(settings, pairs, free)
    batch, epochs = chosen["effective_batch_size"], chosen["epochs"]
    assert batch in {1024, 512, 256, 128, 64, 32} and 10 <= epochs <= defaults.MOST_EPOCHS
    for name in FREE - free:
        assert chosen[name] == getattr(settings, name)

    def steps(batch, epochs):
        return EpochPlan(pairs, min(batch, pairs), min(batch, pairs), 0).steps * epochs

    if free == FREE and epochs < defaults.MOST_EPOCHS:
        assert steps(batch, epochs) >= ENOUGH_STEPS
    if batch < 1024:
        assert steps(batch * 2, 10) < ENOUGH_STEPS
    if epochs > 10:
        assert steps(batch, epochs - 1) < ENOUGH_STEPS


@pytest.fixture
def small(tmp_path):
    write_shard(tmp_path / "data" / "train" / "0.tar", range(40))
    return {"model": "tiny", "data_dir": tmp_path / "data", "output_dir": tmp_path / "runs"}


def test_what_is_chosen_is_said_with_the_options_that_set_it(small):
    said = list[str]()
    found = follow_catalogue(load_settings(small, environ={}), said.append)
    assert (found.values.effective_batch_size, found.values.epochs) == (32, 100)
    assert found.origins["epochs"] == "catalogue"
    assert found.values.lr == own_learning_rates("tiny")["dual_lora"]
    (line,) = said
    assert "--effective-batch-size 32 and --epochs 100" in line and "40 training pairs" in line


@pytest.mark.parametrize("given", [{"epochs": 3}, {"effective_batch_size": 8}, {"lr": 0.5}])
def test_what_the_user_has_set_stays(small, given):
    found = follow_catalogue(load_settings(small | given, environ={}), lambda note: None)
    for name, value in given.items():
        assert getattr(found.values, name) == value


def test_profiles_and_runs_without_training_are_left_alone(small):
    for more in ({"mini_train": True}, {"scenario": "zero_shot"}):
        loaded = load_settings(small | more, environ={})
        said = list[str]()
        found = follow_catalogue(loaded, said.append)
        assert found.values.epochs == loaded.values.epochs and not said
        assert found.values.effective_batch_size == loaded.values.effective_batch_size


def test_a_folder_may_bring_rates_and_other_contents_are_ignored(tmp_path):
    path = tmp_path / "clipft.json"
    for content, expected in (
        ({"learning_rates": {"full": 1e-5, "dual_lora": "fast"}}, {"full": 1e-5}),
        ({"learning_rates": [1]}, {}),
        ([1, 2], {}),
    ):
        path.write_text(json.dumps(content))
        assert own_learning_rates(str(tmp_path)) == expected
    assert own_learning_rates(str(tmp_path / "nothing")) == {}
