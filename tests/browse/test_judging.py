"""A verdict is blind, is counted once, and reaches the disk before it is acknowledged."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipft.browse.judging import Judging
from clipft.core.errors import StorageError, UsageError
from clipft.runs.judgments import read_judgments


@pytest.fixture
def path(tmp_path):
    return tmp_path / "judgments.jsonl"


@pytest.fixture
def judging(comparison, catalogue, path):
    return Judging(comparison, path, 2, catalogue, range(96, 136))


def test_a_verdict_goes_to_the_model_whose_list_it_was(judging, path):
    for choice in ("a", "b"):
        name, trial = judging.draw()
        judging.judge(name, choice)
        line = json.loads(path.read_text().splitlines()[-1])
        assert line["outcome"] == trial.order["ab".index(choice)]
        assert line["first"] == trial.order[0]
        assert line["shown"][trial.order[0]] == [image.key for image in trial.lists[0]]
    assert judging.tally.judged == 2


def test_the_order_of_the_lists_is_random(judging):
    orders = {judging.draw()[1].order for _ in range(25)}
    assert len(orders) == 2, "one order alone comes up once in 17 million times"


def test_drawn_captions_are_of_the_given_images_and_never_twice(judging, comparison):
    drawn = []
    with pytest.raises(UsageError, match="no other caption"):
        while True:
            drawn.append(judging.draw()[1].found)
    owns = [found.query.own for found in drawn]
    assert set(owns) <= set(range(96, 136)) and len(set(owns)) == len(owns) > 10
    for found in drawn:
        assert found.query.words == comparison.caption(found.query.own)
        assert not found.same


def test_what_was_judged_in_an_earlier_session_is_told_and_not_drawn(
    judging, comparison, catalogue, path
):
    name, trial = judging.draw()
    judging.judge(name, "same")
    again = Judging(comparison, path, 2, catalogue, [trial.found.query.own])
    assert again.tally.same == 1
    with pytest.raises(UsageError, match="no other caption"):
        again.draw()


def test_a_trial_is_judged_once(judging):
    name, _ = judging.draw()
    judging.judge(name, "neither")
    for gone in (name, "", "unknown"):
        with pytest.raises(UsageError, match="already judged"):
            judging.judge(gone, "a")
    assert judging.tally.judged == 1


def test_an_unknown_verdict_is_refused_and_the_trial_stays(judging):
    name, _ = judging.draw()
    with pytest.raises(UsageError, match="a, b, same, neither"):
        judging.judge(name, "fine_tuned")
    judging.judge(name, "a")


def test_what_was_shown_with_names_cannot_be_judged_blind(judging, comparison):
    found = comparison.by_words("a green sofa")
    judging.shown(found)
    with pytest.raises(UsageError, match="already shown"):
        judging.start(found)


def test_a_verdict_that_cannot_be_written_can_be_given_again(judging, path):
    name, _ = judging.draw()
    path.mkdir()
    with pytest.raises(StorageError):
        judging.judge(name, "a")
    assert judging.tally.judged == 0
    path.rmdir()
    judging.judge(name, "a")
    assert judging.tally.judged == 1


def test_verdicts_of_several_tabs_are_all_kept(judging, path):
    names = [judging.draw()[0] for _ in range(12)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: judging.judge(name, "same"), names))
    assert len(read_judgments(path, 2)) == judging.tally.same == 12
