"""Tip-Adapter against the formula of the paper, and what it chooses."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clipft.metrics import tip_adapter as module
from clipft.metrics.classification import Labelled
from clipft.metrics.tip_adapter import tip_adapter


def drawn(images: int, seed: int, noise: float = 0.4) -> Labelled:
    centers = normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(9)), dim=1)
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(images) % 4
    rows = centers[targets] + noise * torch.randn(images, 8, generator=draw)
    return Labelled(normalize(rows, dim=1), targets)


def test_the_scores_are_those_of_the_paper():
    train, test = drawn(12, 1), drawn(5, 2)
    vectors = normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    ours = module._scores(train, test.features, vectors, 50.0, 2.0, 5.5)
    affinity = test.features @ train.features.T  # lines 3 to 5 of its algorithm, in its code
    cache_logits = torch.exp(-(5.5 - 5.5 * affinity)) @ one_hot(train.targets, 4).float()
    clip_logits = 50.0 * test.features @ vectors.T
    torch.testing.assert_close(ours, clip_logits + cache_logits * 2.0)


def test_it_uses_training_images_where_prompts_are_useless_and_not_where_they_are_misleading():
    train, test, names = drawn(80, 1), drawn(60, 2), ["a", "b", "c", "d"]
    useless = normalize(torch.ones(4, 8), dim=1)
    by_images = tip_adapter(train, test, useless, 100.0, names, seed=1)
    assert by_images.top1 > 0.8
    centers = torch.stack([drawn(400, 5).features[i::4].mean(0) for i in range(4)])
    shuffled = Labelled(
        train.features,
        train.targets[torch.randperm(80, generator=torch.Generator().manual_seed(4))],
    )
    by_prompts = tip_adapter(shuffled, test, normalize(centers, dim=1), 100.0, names, seed=1)
    assert by_prompts.top1 > 0.8


@pytest.mark.parametrize("targets", [[0], [0, 1], [2, 2]])
def test_few_training_images_are_enough(targets):
    train = Labelled(drawn(len(targets), 1).features, torch.tensor(targets))
    found = tip_adapter(train, drawn(8, 2), drawn(4, 3).features, 100.0, list("abcd"), seed=1)
    assert len(found.right) == 8 and np.isfinite(found.top1)
