import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from clipft.metrics.bootstrap import interval, resampled
from clipft.metrics.definitions import DEFINITIONS, GROUPED, PAIRED, PerQuery
from clipft.metrics.figures import DIRECTIONS
from clipft.metrics.ranking import retrieval
from clipft.metrics.relevance import Identities, numbered
from clipft.metrics.retrieval import EvaluationOptions, difference, evaluate
from tests.metrics.embeddings import PLENTY, unit

OPTIONS = EvaluationOptions(memory=PLENTY, resamples=300, seed=1)
ALONE = Identities(np.arange(60), np.arange(60))


def noisy(images, amount, seed):
    return functional.normalize(images + amount * unit(len(images), seed), dim=-1)


def measured(amount=1.0, seed=2, identities=ALONE, options=OPTIONS):
    images = unit(60, 1)
    labels = [None if i % 3 else f"kind {i % 2}" for i in range(60)]
    return evaluate(images, noisy(images, amount, seed), identities, labels, options)


def test_paired_figures_equal_those_of_each_epoch():
    images = unit(60, 1)
    short = retrieval(images, noisy(images, 1.0, 2), PLENTY).to_dict()
    evaluation = measured()
    assert evaluation.retrieval.to_dict() == short  # to the last bit
    full = evaluation.to_dict()
    for direction in DIRECTIONS:
        for name, value in short[direction].items():
            assert full["paired"][direction]["figures"][name]["value"] == pytest.approx(value)


def test_figures_of_embeddings_that_are_cut_off():
    images = unit(60, 1)
    texts = noisy(images, 1.0, 2)
    found = measured(options=replace(OPTIONS, dimensions=(8, 4))).to_dict()
    assert list(found["by_dimensions"]) == [str(images.shape[1]), "8", "4"]
    whole = found["by_dimensions"][str(images.shape[1])]
    assert whole["recall"] == pytest.approx(found["recall"])
    scores = (
        functional.normalize(texts[:, :4], dim=1) @ functional.normalize(images[:, :4], dim=1).T
    )
    first = (scores.argmax(1) == torch.arange(60)).double().mean().item()
    assert found["by_dimensions"]["4"]["text_to_image"]["r@1"] == pytest.approx(first)
    assert measured().to_dict()["by_dimensions"] == {}


def test_the_json_holds_every_defined_figure():
    found = json.loads(json.dumps(measured().to_dict(), allow_nan=False))
    for protocol, names in (("paired", PAIRED), ("grouped", GROUPED)):
        assert set(names) <= set(DEFINITIONS[protocol])
        for direction in DIRECTIONS:
            assert set(found[protocol][direction]["figures"]) == set(names)
    assert set(found["by_category"]) == {"kind 0", "kind 1"}
    assert found["by_category"]["kind 0"]["pairs"] == 10


def test_intervals_contain_their_value_and_shrink_with_more_data():
    for part in measured().parts["paired"].values():
        for figure in part.to_dict()["figures"].values():
            if "low" in figure:
                assert figure["low"] <= figure["value"] <= figure["high"]
    random = np.random.default_rng(0)
    widths = []
    for clusters in (50, 5000):
        sample = PerQuery({"x": random.random(clusters)}, np.arange(clusters))
        found = interval(resampled([sample], 500, 0)[0]["x"])
        widths.append(found["high"] - found["low"])
        expected = 2 * 1.96 * np.sqrt(1 / 12 / clusters)
        assert widths[-1] == pytest.approx(expected, rel=0.2)
    assert widths[1] < widths[0] / 5


def test_copies_within_a_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(0).random(40)
    once = PerQuery({"x": values}, np.arange(40))
    copies = PerQuery({"x": np.tile(values, 10)}, np.tile(np.arange(40), 10))
    values = [resampled([sample], 400, 3)[0]["x"] for sample in (once, copies)]
    np.testing.assert_allclose(*values)


def test_intervals_cover_the_truth_at_their_stated_rate():
    random, covered = np.random.default_rng(5), 0
    for _ in range(300):
        sample = PerQuery({"x": (random.random(100) < 0.3).astype(float)}, np.arange(100))
        found = interval(resampled([sample], 300, 9)[0]["x"])
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.89 <= covered / 300 <= 0.99


def test_a_model_does_not_differ_from_itself():
    for figures in difference(measured(), measured())["paired"].values():
        for name, figure in figures.items():
            assert figure["value"] == 0, name
            assert figure.get("clear") in (False, None)


def test_a_better_model_differs_clearly_and_shared_resamples_narrow_the_interval():
    good, bad = measured(0.7), measured(3.0)
    found = difference(good, bad)["paired"]["text_to_image"]["r@5"]
    assert found["clear"] and found["value"] > 0 and found["low"] > 0
    # The difference to a hardly changed model is known far better than either figure
    near = measured(1.001)
    change = difference(near, measured(1.0))["paired"]["text_to_image"]["mrr"]
    alone = near.parts["paired"]["text_to_image"].to_dict()["figures"]["mrr"]
    assert change["high"] - change["low"] < (alone["high"] - alone["low"]) / 3


def test_without_resamples_there_are_no_intervals():
    options = EvaluationOptions(PLENTY, resamples=0, seed=1)
    found = measured(options=options)
    assert "low" not in found.to_dict()["paired"]["text_to_image"]["figures"]["r@1"]
    assert difference(found, found)["recall"] == {"value": 0.0}


def test_nan_embeddings_rank_last_and_raise_nothing():
    images = unit(60, 1) * float("nan")
    found = evaluate(images, unit(60, 2), ALONE, [None] * 60, OPTIONS).to_dict()
    figures = json.loads(json.dumps(found, allow_nan=False))["paired"]["text_to_image"]["figures"]
    assert figures["r@10"]["value"] == 0 and figures["mean_rank"]["value"] == 60


def test_a_perfect_model_reaches_the_upper_bound_of_repeated_captions():
    captions = numbered(i // 3 for i in range(60))
    texts = unit(20, 4, dim=64)[captions]
    identities = Identities(captions, np.arange(60))
    found = evaluate(texts.clone(), texts, identities, [None] * 60, OPTIONS)
    part = found.parts["paired"]["text_to_image"]
    assert part.upper_bound and part.means == pytest.approx(part.upper_bound)
    assert found.parts["grouped"]["text_to_image"].means["map"] == 1
    assert found.clusters == 20


def test_memory_does_not_change_the_figures():
    small = EvaluationOptions(1, 50, 1)
    assert torch.equal(
        torch.tensor(measured(options=small).recall()), torch.tensor(measured().recall())
    )
