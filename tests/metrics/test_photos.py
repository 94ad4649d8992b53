"""Another photo of the same product, against a plain loop over all images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.evaluation.evaluator import Comparison
from clipft.metrics.figures import figure_tables
from clipft.metrics.photos import photo_figures
from clipft.metrics.relevance import Identities, relevance
from clipft.metrics.retrieval import EvaluationOptions, difference, evaluate
from tests.metrics.embeddings import PLENTY, unit


def plainly(images: np.ndarray, identities: Identities) -> dict[str, list[float]]:
    _, first = np.unique(identities.images, return_index=True)
    distinct = sorted(first.tolist())
    found: dict[str, list[float]] = {"hit@1": [], "map": []}
    for query in distinct:
        others = [i for i in distinct if i != query]
        group = identities.groups[query]
        right = {i for i in others if identities.groups[i] == group >= 0}
        if not right:
            continue
        ranking = sorted(others, key=lambda i: (-float(images[query] @ images[i]), i))
        found["hit@1"].append(float(ranking[0] in right))
        places = [n for n, i in enumerate(ranking, 1) if i in right]
        found["map"].append(float(np.mean([k / n for k, n in enumerate(places, 1)])))
    return found


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 25),
    kinds=st.integers(1, 12),
    levels=st.integers(1, 3),
)
def test_figures_are_those_of_sorting_all_other_images(seed, size, kinds, levels):
    """Small integers as embeddings, so that scores are exact and many are equal."""
    random = np.random.default_rng(seed)
    images = random.integers(-levels, levels + 1, (size, 3)).astype(np.float32)
    own = np.arange(size)
    same_files = np.where(random.random(size) < 0.2, own // 2 * 2, own)
    images = images[same_files]
    groups = random.integers(-1, kinds, size)[same_files]
    identities = Identities(own, same_files, groups)
    found = photo_figures(torch.from_numpy(images), identities, relevance(identities), PLENTY)
    expected = plainly(images, identities)
    if not expected["hit@1"]:
        assert found is None
        return
    assert found.figures["hit@1"].tolist() == expected["hit@1"]
    assert found.figures["map"].tolist() == pytest.approx(expected["map"])


def evaluated(noise: float, groups: np.ndarray | None):
    products = unit(20, 1).repeat_interleave(3, 0)
    images = torch.nn.functional.normalize(products + noise * unit(60, 2), dim=1)
    identities = Identities(np.arange(60), np.arange(60), groups)
    return evaluate(images, unit(60, 3), identities, [None] * 60, EvaluationOptions(PLENTY, 200, 1))


def test_an_evaluation_has_them_with_intervals_before_and_after():
    groups = np.arange(60) // 3
    before, after = evaluated(6.0, groups), evaluated(0.1, groups)
    part = after.to_dict()["photos"]["image_to_image"]
    assert part["queries"] == 60 and part["candidates"] == 59
    assert part["figures"]["hit@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    change = difference(after, before)["photos"]["image_to_image"]["hit@1"]
    assert change["clear"] and 0 < change["low"] < change["value"]
    assert before.parts["paired"].keys() == {"text_to_image", "image_to_text"}


def test_there_are_none_without_products_or_with_one_photo_each():
    for groups in (None, np.arange(60)):
        assert "photos" not in evaluated(0.1, groups).to_dict()


def test_the_report_has_a_table_of_them():
    groups = np.arange(60) // 3
    compared = Comparison(evaluated(6.0, groups), evaluated(0.1, groups)).to_dict()
    *_, photos = figure_tables([], compared)
    assert photos["title"] == "Another photo of the same product, 60 of 60 images"
    rows = {row["key"]: row for row in photos["rows"]}
    assert rows["photos/image_to_image/map"]["unit"] == "decimal"
    assert rows["photos/image_to_image/hit@1"]["name"] == "image → image Hit@1"
    assert rows["photos/image_to_image/hit@1"]["change"]["clear"]
