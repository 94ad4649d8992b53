"""The statistics of comparisons agree with scipy and statsmodels, and keep what they promise."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from clipft.metrics.comparisons import (
    against_reference,
    differences,
    holm,
    interval,
    over_seeds_and_queries,
    p_value,
    paired_difference,
    spread,
)

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=40)
P_VALUES = st.lists(st.floats(0, 1), max_size=20)


def seeded(values):
    return dict(enumerate(values))


def test_mean_and_deviation_agree_with_textbook_formulas():
    found = spread({1: 1.0, 2: 2.0, 3: 6.0})
    assert found["mean"] == 3.0 and found["sd"] == pytest.approx(math.sqrt(7))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(4.302653 * math.sqrt(7 / 3))
    assert spread({1: 2.0})["sd"] is None and interval({1: 2.0}) is None
    assert spread({})["mean"] is None
    assert differences({1: 3.0, 2: 4.0}, {2: 1.0, 3: 9.0}) == {2: 3.0}


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_interval_and_p_value_over_seeds_are_those_of_scipys_t_test(values):
    if np.std(values) < 1e-6:
        return
    wanted = scipy.stats.ttest_1samp(values, 0)
    assert interval(seeded(values)) == pytest.approx(tuple(wanted.confidence_interval()), abs=1e-9)
    assert p_value(seeded(values)) == pytest.approx(wanted.pvalue, rel=1e-6, abs=1e-12)


def test_differences_without_spread_are_certain_and_a_single_seed_says_nothing():
    assert p_value({1: 0.5, 2: 0.5}) == 0.0
    assert p_value({1: 0.0, 2: 0.0}) == 1.0
    assert p_value({1: 0.5}) is None
    found = against_reference({"a": {1: 0.5}})["a"]
    assert found["p"] is found["p_adjusted"] is found["clear"] is None


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_holm_is_that_of_statsmodels(count):
    p_values = list(np.random.default_rng(count).random(count) ** 3)
    p_values += p_values[:2]  # equal ones
    wanted = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(wanted), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(P_VALUES)
def test_adjusted_p_values_keep_their_order_and_are_never_smaller(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert [a for _, a in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_what_is_clear_alone_need_not_be_clear_among_many():
    # A paired t-test of p = 0.03 or so
    near = {1: 0.010, 2: 0.014, 3: 0.022}
    assert against_reference({"a": near})["a"]["clear"] is True
    others = {name: {1: 0.01, 2: -0.01, 3: 0.001} for name in "bcd"}
    found = against_reference({"a": near, **others})
    assert found["a"]["clear"] is False and found["a"]["low"] > 0
    assert found["a"]["p_adjusted"] == pytest.approx(4 * found["a"]["p"])
    assert list(found) == ["a", "b", "c", "d"]


def test_one_seed_alone_is_no_comparison_that_costs_the_others():
    near = {1: 0.010, 2: 0.014, 3: 0.022}
    found = against_reference({"a": near, "b": {1: 0.5}})
    assert found["a"]["p_adjusted"] == found["a"]["p"]


def test_a_paired_difference_is_surer_than_its_two_figures():
    noise = np.random.default_rng(0).normal(0, 0.1, 1000)
    found = paired_difference(0.01, 0.51 + noise, 0.5 + noise)
    assert found["low"] == pytest.approx(0.01) and found["clear"] is True
    nothing = np.full(3, np.nan)
    assert paired_difference(0.01, nothing, nothing)["clear"] is None


def drawn(random, seeds, clusters, seed_sd, query_sd, resamples=200):
    """Differences of runs, where each run and each query has an effect of its own."""
    of_queries = random.normal(0, query_sd, clusters)
    of_pairs = random.normal(0, query_sd, (seeds, clusters))
    table = random.normal(0, seed_sd, (seeds, 1)) + of_queries + of_pairs
    picked = random.integers(0, clusters, (resamples, clusters))
    return table.mean(1), table[:, picked].mean(2)


@pytest.mark.parametrize("seed_sd, query_sd", [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_intervals_over_seeds_and_queries_cover_the_truth(seed_sd, query_sd):
    random = np.random.default_rng(7)
    tries, covered = 200, 0
    for number in range(tries):
        values, resampled = drawn(random, 6, 60, seed_sd, query_sd)
        found = over_seeds_and_queries(list(values), resampled, number)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.92 <= covered / tries <= 1.0


def test_with_one_seed_the_interval_is_that_over_the_queries():
    resampled = np.random.default_rng(0).normal(0.1, 0.02, (1, 500))
    found = over_seeds_and_queries([0.1], resampled, 0)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(resampled, [0.025, 0.975]))
    assert found["value"] == 0.1 and found["clear"] is True


def test_seeds_that_disagree_widen_the_interval():
    resampled = np.random.default_rng(0).normal(0.1, 0.02, (3, 1000))
    alike = over_seeds_and_queries([0.1] * 3, resampled, 0)
    shifted = resampled + np.array([[-0.1], [0.0], [0.1]])
    apart = over_seeds_and_queries([0.0, 0.1, 0.2], shifted, 0)
    assert alike["clear"] is True and apart["clear"] is False
    assert apart["high"] - apart["low"] > 3 * (alike["high"] - alike["low"])
