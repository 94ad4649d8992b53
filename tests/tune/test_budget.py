import pytest

from clipft.tune.budget import Budget


@pytest.mark.parametrize(
    ("text", "trials", "seconds"),
    [
        *(("20", 20, None), ("30m", None, 1800), ("2h", None, 7200), ("1.5H", None, 5400)),
        *((" 90 s ", None, 90), ("1d", None, 86400)),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_trials(text, trials, seconds):
    assert Budget.parse(text) == Budget(trials, seconds)


@pytest.mark.parametrize("text", ["", "0", "0m", "soon", "1.5", "-3", "2 hours", "1e3", "m"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="30m or 2h, or a number of trials"):
        Budget.parse(text)


def test_it_is_shown_as_people_write_it():
    assert str(Budget.parse("1")) == "1 trial"
    assert str(Budget.parse("90m")) == "1h30m"


def test_most_of_the_time_is_for_the_search():
    budget = Budget.parse("100s")
    assert budget.reserve(10) == 10
    assert budget.reserve(1000) == pytest.approx(40)
