"""nDCG by grades, against scikit-learn on the whole matrix of scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from clipft.metrics.graded import graded_figures
from clipft.metrics.relevance import Identities, relevance
from clipft.metrics.retrieval import EvaluationOptions, evaluate
from tests.metrics.embeddings import PLENTY, unit


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 60),
    texts=st.integers(1, 12),
    images=st.integers(2, 30),
)
def test_it_is_the_ndcg_of_scikit_learn(seed, rows, texts, images):
    """Each row is a query, an image and a grade, as tables of judgments have them."""
    random = np.random.default_rng(seed)
    of_text, of_image = random.integers(0, texts, rows), random.integers(0, images, rows)
    grades = random.integers(0, 4, rows).astype(np.float64)
    text_vectors, image_vectors = unit(texts, seed), unit(images, seed + 1)
    identities = Identities(of_text, of_image, grades=grades)
    found = graded_figures(
        image_vectors[of_image], text_vectors[of_text], identities, relevance(identities), PLENTY
    )
    judged = np.zeros((texts, images))
    np.maximum.at(judged, (of_text, of_image), grades)
    if not grades.any():
        assert found == {}
        return
    known_texts, known_images = (
        np.array(list(dict.fromkeys(kind.tolist()))) for kind in (of_text, of_image)
    )
    scores = (text_vectors @ image_vectors.T).numpy()[known_texts][:, known_images]
    judged = judged[known_texts][:, known_images]
    for direction, relevant, ranked in (
        ("text_to_image", judged, scores),
        ("image_to_text", judged.T, scores.T),
    ):
        asked = relevant.sum(1) > 0
        ours = found[direction].figures["ndcg@10"]
        if relevant.shape[1] == 1:  # scikit-learn wants two candidates
            assert ours.tolist() == [1.0] * int(asked.sum())
            continue
        theirs = [
            ndcg_score(relevant[[row]], ranked[[row]], k=10, ignore_ties=True)
            for row in np.flatnonzero(asked)
        ]
        assert ours.tolist() == pytest.approx(theirs)


def test_an_evaluation_has_it_only_with_grades():
    own, options = np.arange(20), EvaluationOptions(PLENTY, 100, 1)
    images, texts = unit(20, 1), unit(20, 2)
    grades = np.array([2.0, 0.0] * 10)
    found = [
        evaluate(images, texts, Identities(own, own, grades=g), [None] * 20, options).to_dict()
        for g in (grades, None)
    ]
    part = found[0]["graded"]["text_to_image"]
    assert part["queries"] == 10 and part["candidates"] == 20
    figure = part["figures"]["ndcg@10"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert "graded" not in found[1]
