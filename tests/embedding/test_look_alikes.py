"""Look-alikes against a plain loop over embeddings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.core.common import silent
from clipft.data.positives import product_ids
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import open_pairs
from clipft.distributed.collectives import ALONE
from clipft.embedding.embed import embed_pairs
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel, load_model
from clipft.embedding.look_alikes import look_alikes, nearest_of_others
from tests.conftest import write_shard
from tests.training.process_helpers import results
from tests.training.step.sharded_runs import Run

CURRENT = {"group_field": "type", "hard_negatives": 2, "hard_negatives_by": "current"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train" / "00000.tar", range(40), bad=(7,))
    write_shard(folder / "val" / "00000.tar", range(1000, 1006))
    return folder


def products_of(settings: Settings, pairs: PairDataset) -> Tensor:
    products = product_ids(settings, pairs, lambda note: None)
    assert products is not None
    return products


def assert_nearest(found: Tensor, loaded: LoadedModel, settings: Settings) -> None:
    """Compare with the nearest by the embeddings that ``loaded`` gives the images as they are."""
    pairs = open_pairs(settings.data_dir / "train")
    products = products_of(settings, pairs)
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    encoding = live_encoding(loaded, preprocessing, settings)
    embedded = embed_pairs(loaded, pairs, encoding, settings)
    numbers = np.array(embedded.numbers)
    scores = embedded.images @ embedded.images.T
    assert found.shape == (40, 6) and found[7].tolist() == [-1] * 6
    for row, number in enumerate(numbers):
        others = [i for i, n in enumerate(numbers) if products[n] != products[number]]
        nearest = sorted(others, key=lambda i: -float(scores[row, i]))[:6]
        ours = [float(scores[row, list(numbers).index(n)]) for n in found[number].tolist()]
        torch.testing.assert_close(ours, [float(scores[row, i]) for i in nearest])
        assert all(products[n] != products[number] for n in found[number].tolist())


def test_they_are_the_nearest_images_of_other_products(data):
    given = {"model": "tiny", "data_dir": data, "device": "cpu", "precision": "fp32"}
    given |= {"num_workers": 0, "group_field": "type", "hard_negatives": 2, "max_bad": 0.2}
    settings = load_settings(given, environ={}).values
    pairs = open_pairs(data / "train")
    found = look_alikes(settings, pairs, products_of(settings, pairs), silent)
    assert_nearest(found, load_model(settings, pretrained=True), settings)


@pytest.mark.parametrize(
    "given",
    [
        {"scenario": "dual_lora", "augmentation": "advanced", "lora_dropout": 0.5},
        {"scenario": "linear_probe", "augmentation": "none"},
        {"scenario": "linear_probe", "augmentation": "advanced", "feature_cache": False},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_those_of_the_current_model_follow_its_weights(given: dict[str, Any], data):
    """Without augmentation and dropout, with cached features of a frozen tower or without."""
    run = Run.of({"data_dir": str(data), **CURRENT, **given}, ALONE)
    setup, search = run.setup, run.setup.look_alike_search
    assert search and setup.epoch_plan.look_alikes is None
    cached = given["scenario"] == "linear_probe" and setup.settings.feature_cache
    assert search.how.preprocessing.read_images is not cached
    setup.loaded.model.train()
    first = search.find(ALONE)
    assert_nearest(first, setup.loaded, setup.settings)
    with torch.no_grad():
        for _, parameter in setup.loaded.model.trainable():
            torch.manual_seed(3)
            parameter += 0.1 * torch.randn_like(parameter)
    second = search.find(ALONE)
    assert setup.loaded.model.training and not torch.equal(first, second)
    assert_nearest(second, setup.loaded, setup.settings)


def test_an_image_whose_embedding_is_not_a_number_has_none_and_is_none(monkeypatch, data):
    run = Run.of({"data_dir": str(data), **CURRENT}, ALONE)
    search = run.setup.look_alike_search
    assert search
    encode = run.setup.loaded.model.project_images

    def broken(features: Tensor) -> Tensor:
        rows = encode(features)
        rows[3] = torch.nan
        return rows

    monkeypatch.setattr(run.setup.loaded.model, "project_images", broken)
    found = search.find(ALONE)
    assert found[3].eq(-1).all() and not found.eq(3).any() and found[4].ge(0).all()


def test_a_search_on_some_images_finds_others_among_them(data):
    run = Run.of({"data_dir": str(data), **CURRENT}, ALONE)
    search = run.setup.look_alike_search
    assert search
    found = search.on_some(20).find(ALONE)
    assert len(found) == 40 and found[20:].eq(-1).all() and found.max() == 19


def test_few_images_have_few_look_alikes():
    products = torch.tensor([5, 5, 9])
    images = torch.eye(3)[[0, 0, 1]]
    found = nearest_of_others(images, torch.arange(3), products, 4)
    assert found.tolist() == [[2, -1], [2, -1], [0, 1]]


WAYS = [{"scenario": "dual_lora"}, {"scenario": "full", "shard_weights": True, "ema": 0.5}]


def test_two_processes_find_and_train_the_same(data):
    """With whole and with sharded weights."""
    ways = [{"data_dir": str(data), **CURRENT, **way} for way in WAYS]
    body = f"""
    from clipft.training.loop import find_look_alikes
    from tests.training.step.sharded_runs import Run
    result = []
    for given in {ways!r}:
        run = Run.of(given, processes)
        find_look_alikes(run.setup, run.state)
        result.append([run.state.look_alikes.tolist(), run.train(), run.state.step])
"""
    first, second = results(body)
    assert first == second
    for given, (found, told, steps) in zip(ways, first, strict=True):
        run = Run.of(given, ALONE)
        search = run.setup.look_alike_search
        assert search
        assert found == search.find(ALONE).tolist()
        assert told == pytest.approx(run.train(), rel=1e-3)
        assert run.state.step == steps == 4


def test_a_sample_is_drawn_from_the_pairs_that_shots_have_chosen(data):
    run = Run.of({"data_dir": str(data), **CURRENT}, ALONE)
    search = run.setup.look_alike_search
    assert search
    chosen = PairDataset(search.pairs.shards, chosen=(3, 11, 20, 30, 35))
    some = replace(search, pairs=chosen, products=torch.arange(5)).on_some(3)
    assert [some.pairs.named(n).key for n in range(3)] == [chosen.named(n).key for n in range(3)]
    found = some.find(ALONE)
    assert [set(row.tolist()) for row in found] == [{1, 2}, {0, 2}, {0, 1}, {-1}, {-1}]
