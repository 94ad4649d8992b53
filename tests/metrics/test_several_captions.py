"""Retrieval where images have several captions, as in COCO and Flickr30k, beside other tools."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from clipft.metrics.bootstrap import interval
from clipft.metrics.definitions import paired_figures, upper_bound_ranks
from clipft.metrics.ranking import paired_ranks, retrieval
from clipft.metrics.relevance import Identities, relevance
from clipft.metrics.retrieval import EvaluationOptions, evaluate
from tests.metrics.embeddings import PLENTY, naive_ranks, tied, unit

COUNTS = st.lists(st.integers(1, 6), min_size=10, max_size=24)
"""The number of captions of each image."""


def embedded(counts, seed, kind=unit, noise=1.0):
    """Return images, texts and the image of each text; captions resemble their image."""
    owners = np.repeat(np.arange(len(counts)), counts)
    images, texts = kind(len(counts), seed), kind(len(owners), seed + 1)
    if kind is unit:
        texts = functional.normalize(images[owners] + noise * texts, dim=-1)
    return images, texts, owners


def in_our_order(queries, candidates):
    """Return scores without ties, so that no sort of another tool can break them its own way."""
    return -torch.from_numpy(naive_ranks((queries @ candidates.T).numpy())).float()


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), kind=st.sampled_from([unit, tied]))
def test_recall_is_that_of_clip_benchmark(counts, seed, kind):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    images, texts, owners = embedded(counts, seed, kind)
    right = torch.zeros(len(texts), len(images), dtype=torch.bool)
    right[torch.arange(len(texts)), torch.from_numpy(owners)] = True
    ours = retrieval(images, texts, 4000, torch.from_numpy(owners))
    for k in (1, 5, 10):
        to_image = theirs.recall_at_k(in_our_order(texts, images), right, k)
        to_text = theirs.recall_at_k(in_our_order(images, texts), right.T, k)
        assert ours.text_to_image[f"r@{k}"] == pytest.approx((to_image > 0).float().mean().item())
        assert ours.image_to_text[f"r@{k}"] == pytest.approx((to_text > 0).float().mean().item())
    assert ours.pairs == len(images)


@pytest.mark.parametrize("kind", [unit, tied])
def test_five_captions_to_images_are_five_evaluations_of_open_clip(kind):
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    images, texts, owners = embedded([5] * 60, 3, kind)
    ours = retrieval(images, texts, PLENTY, torch.from_numpy(owners)).text_to_image
    rounds = [in_our_order(texts[nth::5], images) for nth in range(5)]
    theirs = [metrics(scores, torch.eye(60), torch.tensor(1.0)) for scores in rounds]
    for k in (1, 5, 10):
        # Its first argument are "images"; here the captions ask
        assert ours[f"r@{k}"] == pytest.approx(np.mean([m[f"image_to_text_R@{k}"] for m in theirs]))


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), memory=st.integers(1, 9000))
def test_the_rank_of_an_image_is_that_of_its_first_caption(counts, seed, memory):
    images, texts, owners = embedded(counts, seed, tied)
    to_image, to_text = paired_ranks(images, texts, torch.from_numpy(owners), memory)
    by_text = naive_ranks((texts @ images.T).numpy())
    by_image = naive_ranks((images @ texts.T).numpy())
    assert to_image.tolist() == [by_text[i, owner] for i, owner in enumerate(owners)]
    assert to_text.tolist() == [by_image[n, owners == n].min() for n in range(len(images))]


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
@example(pairs=[(0, [1]), (1, [1, 1])], seed=0)
@example(pairs=[(0, [1, 1]), (0, [1]), (1, [1, 1, 1])], seed=0)
def test_no_model_exceeds_the_upper_bounds(pairs, seed):
    """Equal captions and images have equal embeddings in every model."""
    shown = np.array([image for image, _ in pairs])
    captions = np.array([caption for _, own in pairs for caption in own])
    owners = np.repeat(np.arange(len(pairs)), [len(own) for _, own in pairs])
    bounds = upper_bound_ranks(captions, shown, owners)
    images, texts = unit(4, seed, 8)[shown], unit(5, seed + 1, 8)[captions]
    ranks = paired_ranks(images, texts, torch.from_numpy(owners), PLENTY)
    for best, found in zip(bounds, ranks, strict=True):
        ours, theirs = paired_figures(best), paired_figures(found.numpy())
        for name in ("r@1", "r@5", "r@10", "mrr"):
            assert ours[name].mean() >= theirs[name].mean() - 1e-12
        assert ours["mean_rank"].mean() <= theirs["mean_rank"].mean()


def test_distinct_captions_and_images_allow_every_rank_to_be_the_first():
    owners = np.repeat(np.arange(4), 5)
    to_image, to_text = upper_bound_ranks(np.arange(20), np.arange(4), owners)
    assert set(to_image) == set(to_text) == {1}


def test_a_caption_of_two_images_joins_them_with_all_their_captions():
    # Pair 0: a, b; pair 1: b, c; pair 2: d
    captions, owners = np.array([0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 2])
    related = relevance(Identities(captions, np.arange(3), owners=owners))
    assert related.text_rows.tolist() == [0, 1, 3, 4]
    assert related.text_pairs.tolist() == [0, 0, 1, 2]
    edges = list(zip(related.edge_texts.tolist(), related.edge_images.tolist(), strict=True))
    assert edges == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 2)]
    assert related.clusters.tolist() == [0, 0, 1]


def test_a_group_joins_all_captions_of_its_pairs_with_all_its_images():
    groups, owners = np.array([7, -1, 7]), np.array([0, 0, 1, 2, 2])
    related = relevance(Identities(np.arange(5), np.arange(3), groups, owners))
    right = {text: set() for text in range(5)}
    for text, image in zip(related.edge_texts, related.edge_images, strict=True):
        right[int(text)].add(int(image))
    assert right == {0: {0, 2}, 1: {0, 2}, 2: {1}, 3: {0, 2}, 4: {0, 2}}
    assert related.clusters.tolist() == [0, 1, 0]


def evaluated(images, texts, owners, resamples=400, **identities):
    same = Identities(np.arange(len(texts)), np.arange(len(images)), owners=owners, **identities)
    options = EvaluationOptions(PLENTY, resamples, 5)
    return evaluate(images, texts, same, ["one" if n % 2 else None for n in range(40)], options)


def test_resamples_are_drawn_from_images_with_all_their_captions():
    counts = [1 + n % 5 for n in range(40)]
    images, texts, owners = embedded(counts, 8)
    found = evaluated(images, texts, owners)
    assert (found.pairs, found.captions, found.clusters) == (40, len(owners), 40)
    part = found.parts["paired"]["text_to_image"]
    assert (part.queries, part.candidates) == (len(owners), 40)
    hits = paired_ranks(images, texts, torch.from_numpy(owners), PLENTY)[0].numpy() <= 1
    random, values = np.random.default_rng(5), []
    for _ in range(400):
        drawn = random.integers(0, 40, 40)
        values.append(np.concatenate([hits[owners == image] for image in drawn]).mean())
    theirs = interval(np.array(values))
    assert part.to_dict()["figures"]["r@1"] == pytest.approx({"value": hits.mean(), **theirs})


def test_a_category_has_the_captions_of_its_images():
    images, texts, owners = embedded([3] * 40, 9)
    (category,) = evaluated(images, texts, owners, 0).categories.values()
    assert category.pairs == 20
    assert category.parts["paired"]["text_to_image"].queries == 60
    assert category.parts["paired"]["image_to_text"].queries == 20
    whole = paired_ranks(images, texts, torch.from_numpy(owners), PLENTY)[0].numpy()
    expected = (whole[owners % 2 == 1] <= 1).mean()
    assert category.parts["paired"]["text_to_image"].means["r@1"] == pytest.approx(expected)


def test_pairs_that_cannot_be_used_take_their_captions_with_them():
    owners = np.array([0, 0, 1, 2, 2, 2])
    whole = Identities(np.arange(6), np.array([5, 6, 7]), np.array([1, -1, 2]), owners)
    kept = whole.of(np.array([0, 2]))
    assert kept.captions.tolist() == [0, 1, 3, 4, 5]
    assert kept.owners.tolist() == [0, 0, 1, 1, 1]
    assert (kept.images.tolist(), kept.groups.tolist()) == ([5, 7], [1, 2])


def test_grouped_figures_count_every_caption_of_an_image_as_right():
    images, texts, owners = embedded([2, 1, 3], 4, noise=0.0)
    same = Identities(np.arange(6), np.arange(3), owners=owners)
    found = evaluate(images, texts, same, [None] * 3, EvaluationOptions(PLENTY, 0, 1))
    assert found.parts["grouped"]["image_to_text"].means["recall@1"] == pytest.approx(
        (1 / 2 + 1 + 1 / 3) / 3
    )
    assert found.parts["grouped"]["image_to_text"].means["map"] == 1
