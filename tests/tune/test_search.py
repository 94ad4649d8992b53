"""The search with a training that takes no time."""

import math
import threading

import pytest

from clipft.config.settings import Settings
from clipft.core.errors import DivergedError, Interrupted, MemoryShortage, StorageError, UsageError
from clipft.training.signals import StopRequest
from clipft.tune.confirm import confirm
from clipft.tune.search import best_of
from clipft.tune.study import covered
from tests.tune.stand_in import RATE, Killed, StandIn, a_search, a_space, hill

pytest.importorskip("optuna")


def what_was_tried(search):
    return [(t.number, t.state, t.changes, t.recall) for t in search.study.trials()]


def test_the_first_trial_is_what_bare_train_would_do(tmp_path):
    train = StandIn()
    search = a_search(tmp_path / "out", train, budget="1")
    search.run()
    (settings,) = train.trained
    bare = search.space.base.values
    assert settings == bare.model_copy(update={"output_dir": settings.output_dir})
    assert [trial.state for trial in search.study.trials()] == ["finished"]


def test_it_finds_better_settings_and_ends_below_the_defaults_never(tmp_path):
    search = a_search(tmp_path / "out", StandIn(), budget="18")
    search.run()
    trials = search.study.trials()
    assert len(trials) == 18
    default, best = trials[0], best_of(trials)
    assert default.recall == pytest.approx(hill(search.space.base.values) * (1 - math.exp(-3)))
    assert best.recall > default.recall + 0.02
    ended = [trial.state for trial in trials]
    assert ended.count("pruned") > 4 and ended[0] == "finished"
    steps = sum(trial.about["steps"] for trial in trials)
    assert steps < 0.85 * 3 * sum(trial.about["epochs"] for trial in trials)


def test_where_everything_is_worse_the_defaults_are_the_best(tmp_path):
    bare = a_space().base.values

    def recall(settings: Settings) -> float:
        same = (settings.lr, settings.wd, settings.lora_targets) == (bare.lr, bare.wd, "qv")
        return 0.3 if same else 0.1

    search = a_search(tmp_path / "out", StandIn(recall), budget="8")
    search.run()
    assert best_of(search.study.trials()).number == 0


@pytest.mark.parametrize(
    ("budget", "kills"), [("8", [(0, 3)]), ("8", [(2, 1), (5, 1)]), ("22", [(3, 2), (20, 2)])]
)
def test_a_search_that_is_killed_and_continued_is_the_same(tmp_path, budget, kills):
    whole = a_search(tmp_path / "whole", StandIn(), budget)
    whole.run()
    left = list(kills)

    def before_epoch(settings: Settings, epoch: int) -> None:
        if left and (int(settings.output_dir.name), epoch) == left[0]:
            del left[0]
            raise Killed

    for _ in kills:
        with pytest.raises(Killed):
            a_search(tmp_path / "killed", StandIn(before_epoch=before_epoch), budget).run()
    again = a_search(tmp_path / "killed", StandIn(before_epoch=before_epoch), budget)
    again.run()
    assert not left
    assert what_was_tried(again) == what_was_tried(whole)
    if budget == "22":  # moves, averaged weights among them, and what the sampler chose
        tried = [trial.user_attrs.get("move") for trial in again.study.study.trials]
        assert "averaged weights" in tried and None in tried


def test_a_larger_budget_continues_a_search(tmp_path):
    whole = a_search(tmp_path / "whole", StandIn(), budget="8")
    whole.run()
    for budget in ("4", "8", "8"):
        part = a_search(tmp_path / "parts", StandIn(), budget=budget)
        part.run()
    assert what_was_tried(part) == what_was_tried(whole)


def test_trials_that_fail_are_recorded_and_the_search_goes_on(tmp_path):
    def recall(settings: Settings) -> float:
        if settings.lora_targets == "all":
            raise DivergedError("the loss is not finite", "lower --lr")
        if settings.effective_batch_size > 32 or settings.augmentation == "advanced":
            raise RuntimeError("CUDA error: out of memory")
        return hill(settings)

    said = []
    search = a_search(tmp_path / "out", StandIn(recall), budget="12", note=said.append)
    search.run()
    trials = search.study.trials()
    failed = {trial.number: trial.about["error"] for trial in trials if trial.state == "failed"}
    assert len(trials) == 12 and set(failed.values()) == {
        "the loss is not finite",
        "memory ran out",
    }
    assert any("failed: the loss is not finite" in text for text in said)
    assert not list((tmp_path / "out" / "trials" / f"{min(failed):04d}").glob("*.pt"))


@pytest.mark.parametrize(
    "error", [MemoryShortage("memory ran out", "buy some"), DivergedError("not finite", "lower")]
)
def test_if_the_defaults_fail_their_error_is_told(tmp_path, error):
    def recall(settings: Settings) -> float:
        raise error

    with pytest.raises(type(error), match=error.message):
        a_search(tmp_path / "out", StandIn(recall)).run()


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(tmp_path):
    def before_epoch(settings: Settings, epoch: int) -> None:
        if settings.output_dir.name == "0001" and epoch == 2:
            raise Killed

    train = StandIn(before_epoch=before_epoch)
    kills = 0
    while kills < 10:
        search = a_search(tmp_path / "out", train, budget="4")
        try:
            search.run()
            break
        except Killed:
            kills += 1
    trials = search.study.trials()
    assert kills == 4 and [trial.state for trial in trials][:2] == ["finished", "failed"]
    assert len(trials) == 4 and "was killed 3 times" in trials[1].about["error"]


def test_a_full_disk_ends_the_search_and_it_can_be_continued(tmp_path):
    full = [True]

    def before_epoch(settings: Settings, epoch: int) -> None:
        if full and settings.output_dir.name == "0003":
            raise StorageError("cannot write", "free some space")

    train = StandIn(before_epoch=before_epoch)
    with pytest.raises(StorageError):
        a_search(tmp_path / "out", train, budget="6").run()
    full.clear()
    again = a_search(tmp_path / "out", train, budget="6")
    again.run()
    assert [t.state for t in again.study.trials()].count("failed") == 0


def test_a_signal_within_a_trial_keeps_it_and_says_how_to_go_on(tmp_path):
    def before_epoch(settings: Settings, epoch: int) -> None:
        if settings.output_dir.name == "0001":
            raise Interrupted("stopped by SIGINT after step 3", "continue with `clipft resume x`")

    search = a_search(tmp_path / "out", StandIn(before_epoch=before_epoch))
    with pytest.raises(Interrupted) as stopped:
        search.run()
    assert stopped.value.hint == "run the same command again to continue"
    assert [trial.state for trial in search.study.trials()] == ["finished", "running"]


def test_a_signal_between_two_trials_begins_no_other(tmp_path):
    stop = StopRequest()

    def before_epoch(settings: Settings, epoch: int) -> None:
        stop.name = "SIGTERM"

    search = a_search(tmp_path / "out", StandIn(before_epoch=before_epoch), stop=stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; everything so far is in"):
        search.run()
    assert [trial.state for trial in search.study.trials()] == ["finished"]


def test_two_workers_share_the_trials_and_the_confirmation(tmp_path):
    trainings = [StandIn(seconds=0.002), StandIn(seconds=0.002)]
    searches = [a_search(tmp_path / "out", train, budget="10") for train in trainings]

    def work(search):
        search.run()
        confirm(search)

    threads = [threading.Thread(target=work, args=(search,)) for search in searches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [trial.number for trial in searches[0].study.trials()] == list(range(10))
    homes = [settings.output_dir for train in trainings for settings in train.trained]
    assert len(homes) == len(set(homes)) == 10 + 4  # ten trials, two more seeds of two variants
    assert all(train.trained for train in trainings)


def test_a_budget_in_time_is_kept(tmp_path):
    search = a_search(tmp_path / "out", StandIn(seconds=0.05), budget="6s")
    search.run()
    confirm(search)
    trials = search.study.trials()
    assert len(trials) >= 2 and search.study.elapsed() < 9
    last = trials[-1]
    assert (
        last.state == "finished"
        or "fell behind" in last.about["why"]
        or "budget" in str(last.about["why"])
    )


def test_a_trial_is_ended_after_an_epoch_when_time_is_up(tmp_path):
    def before_epoch(settings: Settings, epoch: int) -> None:
        if settings.output_dir.name == "0001" and epoch == 2:
            threading.Event().wait(6.1)  # the whole budget

    train = StandIn(before_epoch=before_epoch, seconds=0.01)
    search = a_search(tmp_path / "out", train, budget="6s")
    search.run()
    ended = search.study.trials()[1]
    assert ended.state == "pruned" and "as the budget is used up" in ended.about["why"]
    assert "epoch 2 of" in ended.about["why"]
    assert best_of(search.study.trials()).number == 0


def test_a_budget_that_ends_within_the_first_run_is_told_and_kept(tmp_path):
    with pytest.raises(UsageError, match=r"budget of 0s ended after epoch 1 of 6") as error:
        a_search(tmp_path / "out", StandIn(seconds=0.05), budget="0.01s").run()
    assert "set a larger --budget" in error.value.hint
    train = StandIn()
    search = a_search(tmp_path / "out", train, budget="1")
    search.run()
    assert [trial.state for trial in search.study.trials()] == ["finished"]


def test_other_settings_are_refused_in_the_same_folder(tmp_path):
    a_search(tmp_path / "out", StandIn(), budget="1").run()
    with pytest.raises(UsageError, match="holds a search with other settings: searched"):
        a_search(tmp_path / "out", StandIn(), space=a_space(("lr",)))


def test_weights_of_trials_that_were_stopped_are_removed(tmp_path):
    search = a_search(tmp_path / "out", StandIn(), budget="6")
    search.run()
    for trial in search.study.trials():
        weights = list(search.study.home(trial.number).rglob("*.pt"))
        assert [path.name for path in weights] == ["best.pt"] * (trial.state == "finished")


def test_what_mattered_is_told_once_there_are_enough_trials(tmp_path):
    few = a_search(tmp_path / "few", StandIn(), budget="3")
    few.run()
    assert few.study.importances() == {}

    def recall(settings: Settings) -> float:
        return 0.4 - 0.05 * abs(math.log2(settings.lr / RATE))

    space = a_space(("lr", "wd", "lora_dropout"), data_dir=tmp_path)
    many = a_search(tmp_path / "many", StandIn(recall), budget="20", space=space)
    many.run()
    shares = many.study.importances()
    assert max(shares, key=shares.__getitem__) == "lr" and sum(shares.values()) == pytest.approx(1)


def test_time_counts_once_where_workers_overlap():
    assert covered([]) == 0
    assert covered([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
