"""Compares our figures with the reference implementations of the field on adversarial sets."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipft.metrics.bootstrap import interval, resampled
from clipft.metrics.classification import classify
from clipft.metrics.definitions import PerQuery, grouped_figures
from clipft.metrics.ranking import partner_ranks, ranks_of, score_blocks
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate
from tests.metrics.embeddings import ADVERSARIAL, PLENTY, naive_ranks

KINDS = st.sampled_from(sorted(ADVERSARIAL))
TREC = {
    "map": "map",
    "mrr": "recip_rank",
    "ndcg@10": "ndcg_cut_10",
    "r_precision": "Rprec",
    **{f"recall@{k}": f"recall_{k}" for k in (1, 5, 10)},
    **{f"hit@{k}": f"success_{k}" for k in (1, 5, 10)},
}
"""Our name of a figure -> trec_eval's."""


def scores_of(queries: Tensor, candidates: Tensor) -> "np.ndarray":
    """Return float32 scores in which equal rows have equal scores; NaN is below all others."""
    exact = (queries[:, None].double() * candidates[None].double()).sum(-1)
    return exact.float().nan_to_num(nan=-1e9).numpy()


def trec_eval(scores: "np.ndarray", right: "np.ndarray") -> dict[str, "np.ndarray"]:
    """Return the figures of trec_eval for each query."""
    # Of equal scores it takes the higher name first, and we take the lower position
    names = [f"{len(right[0]) - c:05d}" for c in range(len(right[0]))]
    relevant = {str(q): {names[c]: 1 for c in np.flatnonzero(row)} for q, row in enumerate(right)}
    run = {str(q): dict(zip(names, row.tolist(), strict=True)) for q, row in enumerate(scores)}
    measures = {"map", "recip_rank", "Rprec", "ndcg_cut.10", "recall.1,5,10", "success.1,5,10"}
    found = pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(run)
    of_query = [found[str(q)] for q in range(len(right))]
    return {ours: np.array([each[name] for each in of_query]) for ours, name in TREC.items()}


def grouped(queries: Tensor, candidates: Tensor, right: "np.ndarray", memory: int = PLENTY) -> Any:
    rows, columns = np.nonzero(right)
    edges = torch.from_numpy(rows), torch.from_numpy(columns)
    return grouped_figures(rows, ranks_of(queries, candidates, *edges, memory).numpy())


def recall_at_k(scores: Tensor, positive_pairs: Tensor, k: int) -> Tensor:
    """CLIP_benchmark's recall: the share of a query's right candidates among the first k."""
    first = torch.topk(scores, k, dim=1).indices
    return positive_pairs.gather(1, first).sum(1) / positive_pairs.sum(1)


@settings(max_examples=60, deadline=None)
@given(
    kind=KINDS,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 999),
    share=st.floats(0, 0.5),
    memory=st.sampled_from([1, 20_000, PLENTY]),
)
def test_grouped_figures_equal_trec_eval(kind, shape, seed, share, memory):
    queries, candidates = (
        ADVERSARIAL[kind](rows, at) for rows, at in zip(shape, (seed, seed + 1), strict=True)
    )
    draw = np.random.default_rng(seed)
    right = draw.random(shape) < share
    right[np.arange(shape[0]), draw.integers(0, shape[1], shape[0])] = True
    ours = grouped(queries, candidates, right, memory)
    theirs = trec_eval(scores_of(queries, candidates), right)
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(kind=KINDS, photos=st.integers(2, 12), captions=st.integers(1, 5), seed=st.integers(0, 99))
def test_several_captions_a_photo_equal_trec_eval_and_clip_benchmark(kind, photos, captions, seed):
    """COCO's and Flickr's protocol: each photo has several captions, and all of them are right."""
    images, texts = (ADVERSARIAL[kind](n, seed + n) for n in (photos, photos * captions))
    photo = np.repeat(np.arange(photos), captions)
    pairs = Identities(np.arange(len(photo)), photo)
    options = EvaluationOptions(PLENTY, resamples=0, seed=0)
    found = evaluate(images[photo], texts, pairs, [None] * len(photo), options).parts["grouped"]
    right = photo[:, None] == np.arange(photos)
    scores = scores_of(texts, images)
    for direction, s, r in (
        ("text_to_image", scores, right),
        ("image_to_text", scores.T, right.T),
    ):
        for name, values in trec_eval(s, r).items():
            assert found[direction].means[name] == pytest.approx(values.mean(), abs=1e-12), name
        distinct = torch.from_numpy(-naive_ranks(s))  # topk leaves the order of ties undefined
        for k in (k for k in (1, 5, 10) if k <= s.shape[1]):
            recall = recall_at_k(distinct, torch.from_numpy(r), k)
            assert found[direction].means[f"recall@{k}"] == pytest.approx(
                float(recall.mean()), abs=1e-6
            )
            hits = float((recall > 0).float().mean())  # "recall" in the papers of CLIP
            assert found[direction].means[f"hit@{k}"] == pytest.approx(hits, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_recall_above_is_that_of_clip_benchmark(seed):
    """Its package brings COCO's caption metrics in Java, so the formula stands here as well."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    draw = torch.Generator().manual_seed(seed)
    scores, right = torch.rand(30, 20, generator=draw), torch.rand(30, 20, generator=draw) < 0.2
    right[:, 0] = True
    for k in (1, 5, 10):
        torch.testing.assert_close(recall_at_k(scores, right, k), theirs(scores, right, k))


@pytest.mark.parametrize("kind", sorted(ADVERSARIAL))
def test_paired_figures_equal_open_clip(kind):
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    images, texts = ADVERSARIAL[kind](101, 1), ADVERSARIAL[kind](101, 2)
    for queries, candidates in ((images, texts), (texts, images)):
        # open_clip leaves ties to an unstable sort, so it is given scores in our order
        scores = -torch.from_numpy(naive_ranks(scores_of(queries, candidates))).float()
        theirs = metrics(scores, torch.eye(101), torch.tensor(1.0))
        ranks = partner_ranks(queries, candidates, 30_000).numpy()
        for k in (1, 5, 10):
            assert (ranks <= k).mean() == pytest.approx(theirs[f"image_to_text_R@{k}"])
        assert ranks.mean() == pytest.approx(theirs["image_to_text_mean_rank"])


@settings(max_examples=60, deadline=None)
@given(
    kind=KINDS,
    n=st.integers(2, 60),
    broken=st.sets(st.integers(0, 59), max_size=8),
    broken_queries=st.sets(st.integers(0, 59), max_size=3),
    seed=st.integers(0, 99),
    memory=st.sampled_from([1, 30_000, PLENTY]),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_nan_never_ranks_before_a_number(kind, n, broken, broken_queries, seed, memory, value):
    queries, candidates = ADVERSARIAL[kind](n, seed), ADVERSARIAL[kind](n, seed + 1)
    broken, broken_queries = ({at for at in some if at < n} for some in (broken, broken_queries))
    expected = naive_ranks(scores_of(queries, candidates)).astype(np.int64)
    normalized_away = value * 0  # unit length makes NaN of infinity
    for at in broken:
        candidates[at] = normalized_away
    for at in broken_queries:
        queries[at] = normalized_away
    sound = [c for c in range(n) if c not in broken]
    among_sound = naive_ranks(scores_of(queries[:], candidates[sound]))
    for q in range(n):
        own_is_sound = q not in broken and q not in broken_queries
        expected[q, q] = among_sound[q, sound.index(q)] if own_is_sound else n
    assert partner_ranks(queries, candidates, memory).tolist() == expected.diagonal().tolist()


def test_one_broken_photo_costs_one_pair_among_two_thousand():
    images = torch.nn.functional.normalize(torch.randn(2000, 64), dim=-1)
    texts = images.clone()
    images[7] = torch.nan
    options = EvaluationOptions(PLENTY, resamples=0, seed=0)
    alone = Identities(np.arange(2000), np.arange(2000))
    found = evaluate(images, texts, alone, [None] * 2000, options).parts
    for protocol, name in (("paired", "r@1"), ("grouped", "hit@1")):
        for part in found[protocol].values():
            assert part.means[name] == pytest.approx(1999 / 2000)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    size=st.integers(1, 70),
    different=st.integers(1, 9),
    dim=st.sampled_from([3, 64, 512]),
)
def test_copies_have_equal_scores_whatever_the_block(rows, columns, size, different, dim):
    draw = torch.Generator().manual_seed(rows)
    queries = torch.randn(rows, dim, generator=draw)
    which = torch.randint(0, different, (columns,), generator=draw)
    candidates = torch.randn(different, dim, generator=draw)[which]
    whole = torch.cat([scores.clone() for _, _, scores in score_blocks(queries, candidates, 999)])
    parts = list[Tensor]()
    for start, end, scores in score_blocks(queries, candidates, size):
        assert start == sum(map(len, parts))
        assert end - start == len(scores)
        parts.append(scores.clone())
    first = [which.tolist().index(w) for w in which.tolist()]
    for scores in (torch.cat(parts), whole):
        assert torch.equal(scores, scores[:, first])
        torch.testing.assert_close(scores, queries @ candidates.T, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    clusters=st.integers(2, 60),
    each=st.integers(1, 5),
    seed=st.integers(0, 99),
    constant=st.booleans(),
)
def test_intervals_equal_scipys_bootstrap(clusters, each, seed, constant):
    """A cluster is one observation: scipy resamples its sum and its size together."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, each + 1, clusters)
    cluster = np.repeat(np.arange(clusters), sizes)
    values = np.ones(len(cluster)) if constant else draw.random(len(cluster))
    sample = PerQuery({"x": values}, cluster)
    ours = interval(resampled([sample], 200, seed)[0]["x"])
    theirs = scipy.stats.bootstrap(
        (np.bincount(cluster, values), sizes.astype(float)),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=200,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    assert ours["low"] == pytest.approx(theirs.low, rel=1e-12)
    assert ours["high"] == pytest.approx(theirs.high, rel=1e-12)


def test_an_image_that_is_not_a_number_has_no_label():
    images = torch.eye(6)[[0, 1, 2, 3]].clone()
    images[[0, 3]] = torch.nan
    names = [str(label) for label in range(6)]
    found = classify(images, torch.tensor([0, 1, 2, 0]), torch.eye(6), names)
    assert found.right[[0, 3]].sum() == 0
    assert found.confusion.sum() == 2
    assert (found.top1, found.top5) == (0.5, 0.5)
    assert found.recalls[:3].tolist() == [0.0, 1.0, 1.0]
    assert found.to_dict()["images"] == 4


def test_a_label_that_is_not_a_number_is_never_given():
    labels = torch.eye(8)
    labels[2] = torch.nan
    found = classify(-torch.eye(8), torch.arange(8), labels, [str(label) for label in range(8)])
    assert found.confusion[:, 2].sum() == 0
    assert not found.right[2].any()


@pytest.mark.parametrize("kind", sorted(ADVERSARIAL))
def test_classification_equals_clip_benchmarks_formula(kind):
    images, labels = ADVERSARIAL[kind](120, 3), ADVERSARIAL[kind](8, 4)
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, 8, 120))
    found = classify(images, targets, labels, [str(label) for label in range(8)])
    distinct = torch.from_numpy(-naive_ranks(scores_of(images, labels))).float()
    accuracy = partial(topk_accuracy, distinct, targets)
    assert (found.top1, found.top5) == (pytest.approx(accuracy(1)), pytest.approx(accuracy(5)))


def topk_accuracy(output: Tensor, target: Tensor, k: int) -> float:
    """CLIP_benchmark's acc1 and acc5, whose own code does not run with newer versions of NumPy."""
    return float((output.topk(k, 1).indices == target[:, None]).any(1).float().mean())
