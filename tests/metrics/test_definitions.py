"""Compares our figures with those of well-known libraries, on embeddings that expose mistakes."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.metrics.definitions import grouped_figures, paired_figures, upper_bound_ranks
from clipft.metrics.ranking import ranks_of
from tests.metrics.embeddings import PLENTY, naive_ranks, tied, unit

SEEDS = range(4)


def case(kind, seed):
    """Return queries, candidates, and which are right; each query has at least one."""
    queries, candidates = kind(30, seed), kind(40, seed + 50)
    right = np.random.default_rng(seed).random((30, 40)) < 0.1
    right[np.arange(30), np.arange(30)] = True
    return queries, candidates, right


def ours(queries, candidates, right):
    rows, columns = np.nonzero(right)
    edges = torch.from_numpy(rows), torch.from_numpy(columns)
    return grouped_figures(rows, ranks_of(queries, candidates, *edges, PLENTY).numpy())


def as_scores(queries, candidates):
    """Return scores without ties, in the order in which we rank tied ones.

    Libraries that leave the order of ties undefined are compared on these.
    """
    return -naive_ranks((queries @ candidates.T).numpy()).astype(np.float64)


@pytest.mark.parametrize("kind", [unit, tied])
@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision_equals_sklearns(kind, seed):
    average_precision = pytest.importorskip("sklearn.metrics").average_precision_score
    queries, candidates, right = case(kind, seed)
    scores = as_scores(queries, candidates)
    theirs = [average_precision(r, s) for r, s in zip(right, scores, strict=True)]
    np.testing.assert_allclose(ours(queries, candidates, right)["map"], theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_ndcg_equals_sklearns(seed):
    ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score
    queries, candidates, right = case(unit, seed)
    scores = (queries @ candidates.T).numpy()
    theirs = ndcg_score(right.astype(float), scores, k=10, ignore_ties=True)
    assert ours(queries, candidates, right)["ndcg@10"].mean() == pytest.approx(theirs)


@pytest.mark.parametrize("kind", [unit, tied])
@pytest.mark.parametrize("seed", SEEDS)
def test_figures_equal_torchmetrics(kind, seed):
    library = pytest.importorskip("torchmetrics.retrieval")
    queries, candidates, right = case(kind, seed)
    # torchmetrics counts scores of 0 and below as wrong, so shift them (cosines would need + 2)
    scores = torch.from_numpy(as_scores(queries, candidates) + 41)
    index = torch.arange(30)[:, None].expand(30, 40)
    theirs = {
        "map": library.RetrievalMAP(),
        "mrr": library.RetrievalMRR(),
        "ndcg@10": library.RetrievalNormalizedDCG(top_k=10),
        "r_precision": library.RetrievalRPrecision(),
        **{f"hit@{k}": library.RetrievalHitRate(top_k=k) for k in (1, 5, 10)},
        **{f"recall@{k}": library.RetrievalRecall(top_k=k) for k in (1, 5, 10)},
    }
    figures = ours(queries, candidates, right)
    assert set(figures) == set(theirs)
    for name, metric in theirs.items():
        expected = metric(scores.flatten(), torch.from_numpy(right).flatten(), index.flatten())
        assert figures[name].mean() == pytest.approx(float(expected), abs=1e-6), name


@pytest.mark.parametrize("seed", SEEDS)
def test_figures_equal_sentence_transformers(seed):
    module = "sentence_transformers.evaluation"
    evaluator = pytest.importorskip(module).InformationRetrievalEvaluator
    queries, candidates, right = case(unit, seed)
    relevant = {str(q): {str(c) for c in np.flatnonzero(right[q])} for q in range(30)}
    texts = {str(c): "" for c in range(40)}
    metrics = evaluator(
        {str(q): "" for q in range(30)},
        texts,
        relevant,
        mrr_at_k=[40],
        map_at_k=[40],
        ndcg_at_k=[10],
        accuracy_at_k=[1, 5, 10],
        precision_recall_at_k=[1, 5, 10],
    )
    scores = (queries @ candidates.T).numpy()
    found = [
        [{"corpus_id": str(c), "score": float(s)} for c, s in enumerate(row)] for row in scores
    ]
    theirs = metrics.compute_metrics(found)
    figures = {name: values.mean() for name, values in ours(queries, candidates, right).items()}
    assert figures["map"] == pytest.approx(theirs["map@k"][40])
    assert figures["mrr"] == pytest.approx(theirs["mrr@k"][40])
    assert figures["ndcg@10"] == pytest.approx(theirs["ndcg@k"][10])
    for k in (1, 5, 10):
        assert figures[f"hit@{k}"] == pytest.approx(theirs["accuracy@k"][k])
        assert figures[f"recall@{k}"] == pytest.approx(theirs["recall@k"][k])


def test_grouped_equals_paired_with_one_right_candidate_each():
    ranks = np.random.default_rng(0).integers(1, 40, 100)
    paired, grouped = paired_figures(ranks), grouped_figures(np.arange(100), ranks)
    for k in (1, 5, 10):
        np.testing.assert_array_equal(paired[f"r@{k}"], grouped[f"hit@{k}"])
        np.testing.assert_array_equal(paired[f"r@{k}"], grouped[f"recall@{k}"])
    np.testing.assert_array_equal(paired["mrr"], grouped["mrr"])
    np.testing.assert_array_equal(paired["mrr"], grouped["map"])


def best_ranks(captions, images):
    """Return every ranking a perfect model could give.

    The distinct images may come in any order for a caption; equal images rank by position.
    """
    found = []
    for order in permutations(sorted(set(images))):
        candidates = sorted(range(len(images)), key=lambda i: (order.index(images[i]), i))
        place = {pair: rank + 1 for rank, pair in enumerate(candidates)}
        found.append([place[i] for i in range(len(images))])
    return {c: [[r[i] for i in np.flatnonzero(captions == c)] for r in found] for c in captions}


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7))
def test_no_model_exceeds_the_upper_bound(pairs):
    captions, images = map(np.array, zip(*pairs, strict=True))
    bound, _ = upper_bound_ranks(captions, images, np.arange(len(pairs)))
    for caption, possible in best_ranks(captions, images.tolist()).items():
        ours = np.sort(bound[captions == caption])
        for ranks in possible:
            assert (ours <= np.sort(ranks)).all()
        if len(set(images.tolist())) == len(images):  # without copies it can be reached
            assert any((ours == np.sort(ranks)).all() for ranks in possible)


def test_the_upper_bound_of_repeated_captions():
    captions, images = np.array([5, 5, 7, 5]), np.array([0, 1, 2, 3])
    to_image, to_text = upper_bound_ranks(captions, images, np.arange(4))
    assert sorted(to_image.tolist()) == [1, 1, 2, 3]
    assert to_text.tolist() == [1, 2, 1, 3]
