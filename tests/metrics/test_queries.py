"""Retrieval with a sample of the pairs as queries: the figures are those of these queries."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipft.embedding.embed import Embeddings
from clipft.metrics.definitions import GROUPED, PAIRED
from clipft.metrics.ranking import drawn_queries, paired_ranks, retrieval
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate

PLENTY = 1 << 24
PAIRS = 300


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, 16, generator=generator), dim=1)


IMAGES = unit(PAIRS, 1)
OWNERS = np.repeat(np.arange(PAIRS), np.random.default_rng(3).integers(1, 4, PAIRS))
TEXTS = normalize(IMAGES[OWNERS] + unit(len(OWNERS), 2), dim=1)


def evaluated(queries, resamples=0, groups=None, grades=None):
    captions = np.arange(len(OWNERS))
    captions[-3:] = captions[0]  # a caption that several pairs have
    identities = Identities(captions, np.arange(PAIRS), groups, OWNERS, grades)
    labels = ["chair" if pair % 2 else "table" for pair in range(PAIRS)]
    options = EvaluationOptions(PLENTY, resamples, 7, queries=queries)
    return evaluate(IMAGES, TEXTS, identities, labels, options)


def test_the_queries_are_drawn_by_the_seed():
    drawn = drawn_queries(1000, 50, 3)
    assert len(drawn) == 50 and bool((drawn.diff() > 0).all())
    assert torch.equal(drawn, drawn_queries(1000, 50, 3))
    assert not torch.equal(drawn, drawn_queries(1000, 50, 4))
    for most in (0, 1000, 2000):
        assert torch.equal(drawn_queries(1000, most, 3), torch.arange(1000))


def test_each_rank_is_that_among_all_candidates():
    owners, asked = torch.from_numpy(OWNERS), drawn_queries(PAIRS, 40, 7)
    to_image, to_text = paired_ranks(IMAGES, TEXTS, owners, PLENTY)
    some_images, some_texts = paired_ranks(IMAGES, TEXTS, owners, PLENTY, asked)
    assert torch.equal(some_images, to_image[torch.isin(owners, asked)])
    assert torch.equal(some_texts, to_text[asked])


def test_an_epoch_is_measured_on_the_queries():
    asked = drawn_queries(PAIRS, 40, 7)
    found = retrieval(IMAGES, TEXTS, PLENTY, torch.from_numpy(OWNERS), asked)
    assert (found.pairs, found.queries) == (PAIRS, 40)
    assert found == evaluated(40).retrieval


def test_figures_of_all_protocols_are_means_over_the_queries():
    groups = np.arange(PAIRS) // 4
    grades = np.random.default_rng(5).integers(0, 3, PAIRS).astype(np.float64)
    whole, some = (evaluated(most, 100, groups, grades) for most in (0, 60))
    assert (whole.queries, some.queries) == (PAIRS, 60)
    for protocol, names in (("paired", PAIRED), ("grouped", GROUPED)):
        part = some.parts[protocol]["image_to_text"]
        assert (part.queries, part.candidates) == (
            60,
            whole.parts[protocol]["image_to_text"].candidates,
        )
        assert part.means.keys() == names.keys()
    for protocol, directions in whole.parts.items():
        for direction, part in directions.items():
            sample = some.parts[protocol][direction]
            assert sample.candidates == part.candidates
            assert 0 < sample.queries < part.queries
            name = next(iter(part.means))
            assert sample.means[name] == pytest.approx(part.means[name], abs=0.25)
            low, high = np.quantile(sample.resampled[name], [0.001, 0.999])
            assert low <= part.means[name] <= high, (protocol, direction)
    queries = sum(c.parts["paired"]["image_to_text"].queries for c in some.categories.values())
    assert queries == 60
    assert some.clusters <= 60 < whole.clusters


def test_both_models_have_the_same_queries():
    one, other = evaluated(60, 50), evaluated(60, 50)
    assert one.to_dict() == other.to_dict()
    assert one.to_dict()["queries"] == 60


def test_embeddings_of_some_images_keep_their_captions():
    groups = torch.arange(len(OWNERS))
    embedded = Embeddings(
        IMAGES, TEXTS, tuple(range(100, 100 + PAIRS)), (), groups, torch.from_numpy(OWNERS)
    )
    rows = drawn_queries(PAIRS, 40, 7)
    found = embedded.of(rows)
    assert found.numbers == tuple((rows + 100).tolist())
    assert found.owners is not None and found.groups is not None
    assert torch.equal(found.images, IMAGES[rows])
    assert torch.equal(rows[found.owners], torch.from_numpy(OWNERS)[found.groups])
    assert torch.equal(found.texts, TEXTS[found.groups])
    assert embedded.of(torch.arange(PAIRS)) is embedded
    alone = Embeddings(IMAGES, IMAGES, embedded.numbers, ()).of(rows)
    assert torch.equal(alone.texts, IMAGES[rows]) and alone.owners is None
