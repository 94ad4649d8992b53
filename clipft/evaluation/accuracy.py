"""Accuracy of a model that is trained on labels: after each epoch, and compared with others."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipft.config.settings import Settings
from clipft.data.shards.names import tars_in
from clipft.embedding.embed import Embeddings, embed_in_tower, embed_texts
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Tower
from clipft.evaluation.labels import ChosenLabels, choose_labels
from clipft.evaluation.training_features import training_features
from clipft.metrics.bootstrap import resampled
from clipft.metrics.classification import (
    Classification,
    Labelled,
    classify,
    label_embeddings,
    linear_classifier,
)
from clipft.metrics.definitions import PerQuery
from clipft.metrics.retrieval import Part
from clipft.metrics.tip_adapter import tip_adapter

_MOST_TRAINING_IMAGES = 2000
"""The most training images for the linear classifier and Tip-Adapter."""


@dataclass(frozen=True)
class PromptClassifier:
    """Classifies the validation images by the prompts that a run trains on.

    ``labels`` holds the label of each pair, or None. ``tower`` encodes prompts.
    """

    chosen: ChosenLabels
    labels: Sequence[str | None]
    tower: Tower

    @classmethod
    def of(
        cls, settings: Settings, labels: Sequence[str | None], tower: Tower
    ) -> "PromptClassifier | None":
        """Return None without ``label_prompts``, or if no pair has a label."""
        chosen = labels_of_run(settings, labels)
        return cls(chosen, labels, tower) if chosen else None

    def label_vectors(self, loaded: LoadedModel) -> Tensor:
        """Embed each label as the mean of its prompts: float32 [L, D] of unit length.

        All processes of a run must call this, because their weights may be sharded.
        """
        labels, templates = self.chosen.labels, self.chosen.templates
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        rows = embed_in_tower(loaded, self.tower, prompts)
        return normalize(rows.view(len(labels), len(templates), -1).mean(1), dim=1)

    def accuracy(self, embedded: Embeddings, vectors: Tensor) -> float:
        """Return the share of the labeled images whose nearest label is right."""
        test = labelled(embedded, self.chosen, self.labels)
        return classify(test.features, test.targets, vectors, self.chosen.labels).top1


def labels_of_run(settings: Settings, labels: Sequence[str | None]) -> ChosenLabels | None:
    """Choose the labels of the pairs and the prompts of a run that is trained on labels."""
    if not settings.label_prompts:
        return None
    return choose_labels(None, settings.label_prompts, labels, settings.label_field)


def labelled(embedded: Embeddings, chosen: ChosenLabels, labels: Sequence[str | None]) -> Labelled:
    """Return the images that have one of the labels."""
    numbers = [chosen.number(labels[number]) for number in embedded.numbers]
    rows = [row for row, number in enumerate(numbers) if number is not None]
    targets = torch.tensor([number for number in numbers if number is not None], dtype=torch.int64)
    return Labelled(embedded.images[rows], targets)


@dataclass(frozen=True)
class Accuracies:
    """Accuracy of the fine-tuned model, and of classifiers on the pretrained model.

    ``parts`` maps ``zero_shot`` and, with labeled training images, ``linear`` and ``tip_adapter``
    to their figures. ``after`` is None if nothing was trained.
    """

    chosen: ChosenLabels
    field: str
    training_images: int
    parts: dict[str, Part]
    after: Part | None

    def to_dict(self) -> dict[str, Any]:
        """Return the values of ``classification`` in evaluation.json."""
        after = self.after
        return {
            "field": self.field,
            "images": next(iter(self.parts.values())).queries,
            "labels": len(self.chosen.labels),
            "templates": list(self.chosen.templates),
            "training_images": self.training_images,
            "before": {name: _top1(part) for name, part in self.parts.items()},
            "after": _top1(after) if after else None,
            "difference": {name: after.minus(part)["top1"] for name, part in self.parts.items()}
            if after
            else None,
        }


def _top1(part: Part) -> dict[str, Any]:
    figure: dict[str, Any] = part.to_dict()["figures"]["top1"]
    return figure


def compare_accuracy(
    settings: Settings,
    labels: Sequence[str | None],
    pretrained: tuple[LoadedModel, Embeddings],
    fine_tuned: tuple[LoadedModel, Embeddings] | None,
) -> Accuracies | None:
    """Classify the embedded images by each model's prompts, and by the training images.

    Returns:
        None without ``label_prompts``, or if no image has a label.
    """
    chosen = labels_of_run(settings, labels)
    if not chosen:
        return None
    loaded, embedded = pretrained
    test = labelled(embedded, chosen, labels)
    if not len(test.targets):
        return None
    names = chosen.labels
    vectors = label_embeddings(names, chosen.templates, partial(embed_texts, loaded))
    found = {"zero_shot": classify(test.features, test.targets, vectors, names)}
    train = None
    if tars_in(settings.data_dir / "train"):
        train = training_features(loaded, settings, chosen, _MOST_TRAINING_IMAGES)
    if train:
        linear = linear_classifier(train, test, names, settings.seed)
        if linear:
            found["linear"] = linear.figures
        scale = float(loaded.model.logit_scale.detach().exp())
        found["tip_adapter"] = tip_adapter(train, test, vectors, scale, names, settings.seed)
    parts = {name: _part(figures, settings) for name, figures in found.items()}
    after = None
    if fine_tuned:
        loaded, embedded = fine_tuned
        test = labelled(embedded, chosen, labels)
        vectors = label_embeddings(names, chosen.templates, partial(embed_texts, loaded))
        after = _part(classify(test.features, test.targets, vectors, names), settings)
    images = len(train.targets) if train else 0
    return Accuracies(chosen, settings.label_field, images, parts, after)


def _part(figures: Classification, settings: Settings) -> Part:
    """Resample the images. Classifiers of the same number of images get the same resamples."""
    hits = figures.right[:, 0].astype(np.float64)
    sample = PerQuery({"top1": hits}, np.arange(len(hits)))
    values = resampled([sample], settings.resamples, settings.seed)[0]
    return Part(len(hits), len(figures.names), sample.means(), values)
