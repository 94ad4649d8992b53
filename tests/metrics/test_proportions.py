"""Shares and sign tests agree with scipy's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from clipft.metrics.proportions import sign_test, wilson_interval

COUNTS = st.tuples(st.integers(0, 300), st.integers(0, 300)).filter(lambda pair: sum(pair) > 0)


@settings(max_examples=150, deadline=None)
@given(COUNTS)
def test_interval_and_p_value_are_those_of_scipy(counts):
    wins, losses = counts
    expected = binomtest(wins, wins + losses, 0.5)
    interval = expected.proportion_ci(0.95, method="wilson")
    assert wilson_interval(wins, wins + losses) == pytest.approx(interval, abs=1e-12)
    assert sign_test(wins, losses) == pytest.approx(expected.pvalue, rel=1e-9)


def test_without_trials_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert sign_test(0, 0) == 1.0


def test_thousands_of_judgments_are_no_overflow():
    assert sign_test(6000, 5000) == pytest.approx(binomtest(6000, 11000).pvalue, rel=1e-6)
