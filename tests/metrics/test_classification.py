import numpy as np
import pytest
import torch
from torch.nn import functional

from clipft.metrics.classification import Labelled, classify, label_embeddings, linear_classifier
from tests.metrics.embeddings import tied, unit

NAMES = [f"label {i}" for i in range(8)]


def test_a_label_is_the_mean_of_its_prompts():
    vectors = {"a cat.": [1.0, 0.0], "the cat.": [0.0, 1.0]}

    def encode(texts):
        return torch.tensor([vectors[text] for text in texts])

    rows = label_embeddings(["cat"], ["a {}.", "the {}."], encode)
    torch.testing.assert_close(rows, functional.normalize(torch.ones(1, 2), dim=-1))


def test_figures_of_a_case_computed_by_hand():
    images = torch.eye(6)[[0, 0, 0, 1]]
    targets = torch.tensor([0, 0, 1, 1])
    figures = classify(images, targets, torch.eye(6), NAMES[:6])
    assert figures.top1 == 0.75
    assert figures.mean_per_class_recall == (1.0 + 0.5) / 2
    found = figures.to_dict()
    assert (found["images"], found["labels"]) == (4, 6)
    assert found["recall"] == [1.0, 0.5, None, None, None, None]
    assert found["confused"] == [
        {"label": "label 1", "taken_for": "label 0", "images": 1, "share": 0.5}
    ]


def test_top5_is_not_given_for_few_labels():
    assert classify(torch.eye(5), torch.arange(5), torch.eye(5), NAMES[:5]).top5 is None


@pytest.mark.parametrize("kind", [unit, tied])
@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_sklearns(kind, seed):
    """CLIP_benchmark uses the same: acc1 and acc5 by topk, balanced accuracy by sklearn."""
    metrics = pytest.importorskip("sklearn.metrics")
    images, labels = kind(200, seed), kind(8, seed + 9)
    targets = torch.from_numpy(np.random.default_rng(seed).integers(0, 8, 200))
    scores = (images @ labels.T).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")
    ours = classify(images, targets, labels, NAMES)
    assert ours.top1 == pytest.approx(metrics.accuracy_score(targets, order[:, 0]))
    assert ours.top5 == pytest.approx((order[:, :5] == targets.numpy()[:, None]).any(1).mean())
    if kind is unit:
        assert ours.top5 == pytest.approx(metrics.top_k_accuracy_score(targets, scores, k=5))
    balanced = metrics.balanced_accuracy_score(targets, order[:, 0])
    assert ours.mean_per_class_recall == pytest.approx(balanced)
    matrix = metrics.confusion_matrix(targets, order[:, 0], labels=range(8))
    np.testing.assert_array_equal(ours.confusion, matrix)


def clouds(rows, seed, noise):
    """Unit features around one centre per label."""
    targets = torch.from_numpy(np.random.default_rng(seed).integers(0, 8, rows))
    features = functional.normalize(unit(8, 99)[targets] + noise * unit(rows, seed), dim=-1)
    return Labelled(features, targets)


def test_a_linear_classifier_learns_separable_labels_only():
    found = linear_classifier(clouds(200, 1, 0.5), clouds(300, 2, 0.5), NAMES, seed=0)
    assert found and found.figures.top1 > 0.95
    noise = linear_classifier(clouds(200, 1, 50.0), clouds(300, 2, 50.0), NAMES, seed=0)
    assert noise and noise.figures.top1 < 0.3


def test_the_regularization_is_chosen_by_the_data():
    """Features that hardly differ need weak regularization."""

    def near(clouds):
        features = functional.normalize(clouds.features + 20 * unit(1, 5), dim=-1)
        return Labelled(features, clouds.targets)

    found = linear_classifier(near(clouds(400, 1, 0.3)), near(clouds(300, 2, 0.3)), NAMES, seed=0)
    assert found and found.c >= 10 and found.figures.top1 > 0.9


def test_labels_without_training_images_are_wrong_and_one_label_is_refused():
    train, test = clouds(200, 1, 0.3), clouds(300, 2, 0.3)
    known = train.targets < 7
    some = Labelled(train.features[known], train.targets[known])
    found = linear_classifier(some, test, NAMES, seed=0)
    assert found and found.figures.to_dict()["recall"][7] == 0
    one = train.targets == 3
    same = Labelled(train.features[one], train.targets[one])
    assert linear_classifier(same, test, NAMES, seed=0) is None


def test_two_images_with_two_labels_are_enough():
    two = Labelled(unit(2, 0), torch.tensor([0, 1]))
    found = linear_classifier(two, clouds(20, 2, 0.3), NAMES, seed=0)
    assert found and found.training_images == 2
