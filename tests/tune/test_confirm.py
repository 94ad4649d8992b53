"""The winner over seeds, the verdict on the test pairs, and what is written."""

import io
import json
import tomllib

import pytest
from rich.console import Console

from clipft.cli.answers import tune_answer
from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.core.errors import DivergedError
from clipft.tune.confirm import confirm
from clipft.tune.summary import BEST, finish, ranked
from tests.conftest import write_shard
from tests.tune.stand_in import RATE, StandIn, a_search, a_space, hill, no_soup, open_pairs

pytest.importorskip("optuna")


def found(tmp_path, recall=hill, budget="5", with_test=True, recall_of=None, soup=no_soup, **more):
    """Search with a stand-in; returns the search, its training and the content of tune.json."""
    if with_test:
        write_shard(tmp_path / "data" / "test" / "00000.tar", range(3))
    train = StandIn(recall)
    space = a_space(data_dir=tmp_path / "data")
    search = a_search(tmp_path / "out", train, budget, space=space, **more)
    search.run()
    confirm(search)
    return search, train, finish(search, open_pairs(recall_of), soup)


def test_the_winner_is_confirmed_with_the_seeds_of_the_defaults(tmp_path):
    _search, train, content = found(tmp_path)
    confirmation = content["confirmation"]
    assert content["chosen"] > 0
    # The first seed has chosen the winner, which may have been lucky
    assert confirmation["seeds"] == [43, 44]
    assert set(confirmation["difference"]["values"]) == {"43", "44"}
    assert confirmation["difference"]["p_adjusted"] < 0.05
    again = [settings for settings in train.trained if settings.seed != 42]
    assert sorted(settings.seed for settings in again) == [43, 43, 44, 44]
    assert content["verdict"].startswith(
        f"Trial {content['chosen']} is better than the defaults: mean recall on the test pairs "
        "rises from "
    )
    assert content["verdict"].endswith(", over 3 seeds.")
    assert content["measured"]["difference"]["clear"] is True


def test_luck_with_one_seed_does_not_beat_the_defaults(tmp_path):
    def recall(settings: Settings) -> float:
        lucky = settings.lr != RATE and settings.seed == 42
        return 0.4 if lucky else 0.3 if settings.lr == RATE else 0.25

    _search, _, content = found(tmp_path, recall)
    assert content["chosen"] == 0 and content["changes"] == {}
    assert content["verdict"].startswith("Use the defaults: with 2 other seeds, trial ")
    assert tomllib.loads((tmp_path / "out" / BEST).read_text()).keys() == {
        *("model", "epochs", "effective_batch_size", "data_dir")
    }


def test_a_winner_that_fails_with_another_seed_is_not_recommended(tmp_path):
    def recall(settings: Settings) -> float:
        if settings.lr != RATE and settings.seed == 44:
            raise DivergedError("the loss is not finite", "lower --lr")
        return 0.3 if settings.lr == RATE else 0.35

    _, _, content = found(tmp_path, recall)
    assert content["confirmation"]["winner"]["values"]["44"] == 0.0
    assert content["chosen"] == 0


def test_if_no_trial_is_better_nothing_is_trained_again(tmp_path):
    def recall(settings: Settings) -> float:
        return 0.3 if settings.output_dir.name == "0000" else 0.2

    _, train, content = found(tmp_path, recall)
    assert {settings.seed for settings in train.trained} == {42}
    assert content["verdict"].startswith("No trial is better than the defaults, so use these. ")
    assert "on the test pairs is 28.5%" in content["verdict"]


def test_the_test_pairs_choose_nothing(tmp_path):
    def recall_of(folder):
        return 0.5 if "defaults" in str(folder) or "0000" in str(folder) else 0.2

    _, _, content = found(tmp_path, recall_of=recall_of)
    assert content["chosen"] > 0
    assert (
        " won on the validation pairs, but mean recall on the test pairs falls "
        in (content["verdict"])
    )


def test_without_test_pairs_the_verdict_says_that_it_may_flatter(tmp_path):
    _, _, content = found(tmp_path, with_test=False)
    assert "mean recall on the validation pairs rises" in content["verdict"]
    assert content["verdict"].endswith("so it may look better than it is.")


def test_an_unclear_difference_is_told_as_such(tmp_path):
    def recall_of(folder):
        seed = 0.02 * (hash(str(folder)[-30:]) % 7 - 3)
        return 0.3 + seed

    _, _, content = found(tmp_path, recall_of=recall_of)
    low, high = (content["measured"]["difference"][end] for end in ("low", "high"))
    assert low < high
    if low < 0 < high:
        assert content["verdict"].startswith("No clear difference: with trial ")


def test_what_was_measured_is_not_measured_again(tmp_path):
    search, train, content = found(tmp_path)
    runs = len(train.trained)

    def refuse(*wanted):
        raise AssertionError("measured again")

    again = finish(search, refuse, refuse)
    assert again | {"seconds": 0} == json.loads(json.dumps(content)) | {"seconds": 0}
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["verdict"] == again["verdict"]
    assert len(train.trained) == runs


SOUP = {
    **{"split": "test", "soup": {"recall": 0.312}, "best_member": {"recall": 0.3}},
    "to_best_member": {"value": 0.012, "low": -0.001, "high": 0.03, "clear": False},
}


def test_a_soup_of_the_best_runs_is_the_last_candidate(tmp_path):
    asked = []

    def soup(folders, target, settings, note):
        asked.append((folders, target, settings))
        return {**SOUP, "kept": [str(folder) for folder in folders[:2]]}

    search, _, content = found(tmp_path, budget="12", soup=soup)
    ((folders, target, settings),) = asked
    assert target == search.study.folder / "soup" and settings == search.space.base.values
    homes = [folder.parent.relative_to(search.study.folder.resolve()) for folder in folders]
    own = f"trials/{content['chosen']:04d}"
    seeds = [f"confirmation/winner/seed-{seed}" for seed in (43, 44)]
    assert [str(home) for home in homes[:3]] == [own, *seeds]
    assert len(folders) == 6 and len(set(folders)) == 6
    recalls = {f"trials/{t['number']:04d}": t["recall"] for t in content["trials"]}
    others = [recalls[str(home)] for home in homes[3:]]
    finished = [t["recall"] for t in content["trials"] if t["state"] == "finished"]
    assert others == sorted(finished, reverse=True)[1:4]
    assert content["verdict"].endswith(
        " A soup, the mean of the weights of 2 runs, is at 31.2% on the test pairs, and the best "
        "of these runs at 30.0% (+1.2 points, 95% interval -0.1 to +3.0)."
    )
    assert content["soup"]["folder"] == str(target)
    assert (search.study.folder / BEST).is_file()  # the settings of the best run
    again = finish(search, open_pairs(), no_soup)
    assert again["soup"] == json.loads(json.dumps(content["soup"])) and len(asked) == 1


def test_where_the_defaults_are_used_the_soup_begins_with_them(tmp_path):
    asked = []

    def recall(settings: Settings) -> float:
        return 0.3 if settings.output_dir.name == "0000" else 0.2

    found(tmp_path, recall, soup=lambda folders, *_: asked.extend(folders))
    assert asked[0].parent.name == "0000" and len(set(asked)) == len(asked) > 2


def test_the_toml_trains_the_chosen_trial(tmp_path):
    search, _, content = found(tmp_path)
    loaded = load_settings({"output_dir": "x"}, tmp_path / "out" / BEST, environ={}).values
    trial = search.space.settings(content["changes"], output_dir="x").values
    assert loaded == trial
    text = (tmp_path / "out" / BEST).read_text()
    assert "# searched" in text and "# given" in text and "output_dir" not in text


def test_the_answer_fits_a_terminal(tmp_path):
    _, _, content = found(tmp_path, budget="9")
    content["mattered"] = {"lr": 0.5, "lora_targets": 0.3, "wd": 0.2}
    screen = Console(file=io.StringIO(), width=80)
    for part in tune_answer(content, False):
        screen.print(part)
    lines = screen.file.getvalue().splitlines()
    assert len(lines) <= 18 and max(map(len, lines)) <= 80
    assert "9 trials" in screen.file.getvalue()
    best = ranked(content["trials"])[0]
    row = next(line for line in lines if line.split()[:1] == [str(best["number"])])
    assert f"{100 * best['recall']:.1f}%" in row
    assert "Most important settings (PED-ANOVA): lr 50%, lora_targets 30%, wd 20%." in lines


def test_trials_are_ranked_with_those_that_failed_last(tmp_path):
    def recall(settings: Settings) -> float:
        if settings.lora_targets == "all":
            raise DivergedError("not [finite]", "lower --lr")
        return hill(settings)

    _, _, content = found(tmp_path, recall, budget="14")
    states = [trial["state"] for trial in ranked(content["trials"])]
    order = ["finished", "pruned", "failed"]
    assert states == sorted(states, key=order.index) and set(states) == set(order)
    screen = Console(file=io.StringIO(), width=80, markup=True)
    for part in tune_answer(content, True):
        screen.print(part)
    assert "not [finite]" in screen.file.getvalue()
