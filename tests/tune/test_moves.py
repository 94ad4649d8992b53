"""What a search tries before the sampler."""

import math

import pytest

from clipft.tune.moves import Attempt, next_move
from clipft.tune.space import SEARCHABLE, SEARCHED
from tests.tune.stand_in import a_space

THREE = ("lr", "lora_targets", "lora_dropout")


def climb(space, recall, trials):
    """Make so many moves; returns the attempts."""
    attempts = []
    for _ in range(trials):
        move = next_move(space, attempts)
        if move is None:
            break
        name, parameters = move
        attempts.append(Attempt(parameters, recall(parameters), name))
    return attempts


def best(attempts):
    return max(attempts, key=lambda attempt: attempt.recall)


def test_it_begins_with_the_defaults_every_weight_the_rate_and_the_adapters():
    space = a_space()
    object.__setattr__(space, "names", (*space.names, "epochs"))

    def recall(parameters):
        return parameters["lr"] / 100 if parameters["scenario"] == "dual_lora" else 0.0

    first, second, third, fourth = climb(space, recall, 4)
    assert first == Attempt(space.default(), 0.01, "defaults")
    assert second.parameters == space.completed({**first.parameters, "scenario": "full"})
    assert third.parameters == {**first.parameters, "lr": 4}
    changed = {n: v for n, v in fourth.parameters.items() if v != third.parameters[n]}
    assert changed == {"lora_targets": "all", "lora_dropout": 0.3, "wd": 0.3, "epochs": 9}


def test_a_change_that_the_defaults_have_is_not_made():
    space = a_space()
    values = space.base.values.model_copy(update={"lora_targets": "all"})
    object.__setattr__(space.base, "values", values)
    moves = [attempt.move for attempt in climb(space, lambda parameters: 0.1, 5)]
    rates = ["four times the rate", "higher rate", "lower rate"]
    assert moves == ["defaults", "every weight", *rates]


@pytest.mark.parametrize("octave", [-5, -2, 0, 2, 5])
def test_a_rate_is_found_within_a_factor_of_two_wherever_the_default_is(octave):
    def recall(parameters):
        return 0.4 - 0.01 * (math.log2(parameters["lr"]) - octave) ** 2

    attempts = climb(a_space(("lr",)), recall, 20)
    assert abs(math.log2(best(attempts).parameters["lr"]) - octave) <= 1
    assert len(attempts) <= 4 + abs(octave)


def test_each_move_begins_at_the_best_trial_and_is_repeated_while_it_wins():
    def recall(parameters):
        rate = {1.0: 0.2, 4.0: 0.3, 8.0: 0.35, 16.0: 0.33, 2.0: 0.1}[parameters["lr"]]
        return rate + 0.1 * (parameters["ema"] > 0) + 0.1 * parameters["lora_dropout"]

    attempts = climb(a_space(("lr", "ema", "lora_dropout")), recall, 30)
    moves = [attempt.move for attempt in attempts]
    steps = ["four times the rate", "stronger adapters", *["higher rate"] * 2, "averaged weights"]
    assert moves[:6] == ["defaults", *steps]
    assert moves.count("averaged weights") == 1
    assert best(attempts).parameters == {"lr": 8.0, "ema": 0.99, "lora_dropout": 0.3}


def test_nothing_is_tried_twice_and_everything_stays_in_the_space():
    space = a_space(SEARCHABLE)
    for recall in (lambda p: p["lr"], lambda p: -p["lr"], lambda p: 0.1):
        attempts = climb(space, recall, 100)
        assert len(attempts) < 40
        tried = [attempt.parameters for attempt in attempts]
        assert all(one not in tried[:number] for number, one in enumerate(tried))
        for parameters in tried:
            assert all(space.allows(name, value) for name, value in parameters.items())
            assert space.completed(parameters) == parameters
            space.settings(space.changes(parameters))  # valid settings


def test_a_trial_that_failed_or_is_under_way_is_not_repeated():
    space = a_space(("lr",))
    attempts = [
        Attempt({"lr": 1.0}, 0.2, "defaults"),
        Attempt({"lr": 4.0}, None, "four times the rate"),
        Attempt({"lr": 2.0}, None, "higher rate"),
    ]
    assert next_move(space, attempts) == ("lower rate", {"lr": 0.5})
    assert next_move(space, [*attempts, Attempt({"lr": 0.5}, None, "lower rate")]) is None


def test_what_is_not_searched_is_not_moved():
    names = tuple(name for name in SEARCHED if name not in (*THREE, "scenario"))
    for attempt in climb(a_space(names), lambda p: 0.1, 100):
        assert not {*THREE, "scenario"} & attempt.parameters.keys()
    attempts = climb(a_space(("positives",)), lambda parameters: 0.1, 9)
    assert [attempt.move for attempt in attempts] == ["defaults"]


def test_another_scenario_has_its_own_settings_and_its_own_rate():
    space = a_space(("scenario", "lr", "lora_r"))
    attempts = climb(space, lambda p: 0.2 if p["scenario"] == "full" else p["lr"] / 1e3, 30)
    (full,) = [attempt for attempt in attempts if attempt.move == "every weight"]
    assert attempts[1] is full
    assert full.parameters == {"scenario": "full", "lr": 1.0}
