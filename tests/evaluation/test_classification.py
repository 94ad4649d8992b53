import torch
from torch.nn import functional

from clipft.evaluation.classification import classify, label_embeddings


def test_a_label_is_the_mean_of_its_prompts():
    vectors = {"a cat.": [1.0, 0.0], "the cat.": [0.0, 1.0]}

    def encode(texts):
        return torch.tensor([vectors[text] for text in texts])

    rows = label_embeddings(["cat"], ["a {}.", "the {}."], encode)
    torch.testing.assert_close(rows, functional.normalize(torch.ones(1, 2), dim=-1))


def test_figures_on_a_case_worked_out_by_hand():
    labels = torch.eye(6)
    images = torch.eye(6)[[0, 0, 0, 1]]
    targets = torch.tensor([0, 0, 1, 1])
    figures = classify(images, targets, labels)
    assert figures.top1 == 0.75
    assert figures.mean_per_class_recall == (1.0 + 0.5) / 2
    assert (figures.images, figures.labels) == (4, 6)
    assert figures.top5 is not None


def test_top5_of_few_labels_is_not_given():
    assert classify(torch.eye(5), torch.arange(5), torch.eye(5)).top5 is None
