"""Classifies the validation images by prompts over labels, and with a linear classifier."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.files import replacing
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import CaptionTemplate
from clipft.data.shards.dataset import ChosenPairs, open_pairs
from clipft.data.shards.names import tars_in
from clipft.embedding.embed import Embeddings, embed_pairs, embed_texts
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.labels import ChosenLabels
from clipft.metrics.classification import (
    Classification,
    Labelled,
    Linear,
    classify,
    label_embeddings,
    linear_classifier,
)


@dataclass(frozen=True)
class Labelling:
    """The labels with their unit vectors, float32 [L, D], and how well they classify.

    ``prompts`` are the figures of classification by the nearest vector. ``linear`` is None
    without labeled training pairs.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Tensor
    prompts: Classification
    linear: Linear | None

    def to_dict(self, settings: Settings) -> dict[str, Any]:
        """Return the values of ``classification`` in ``clipft zero-shot --json``."""
        resamples, seed = settings.resamples, settings.seed
        linear = self.linear.to_dict(resamples, seed) if self.linear else None
        prompts = self.prompts.to_dict(resamples, seed)
        return {**prompts, "templates": list(self.templates), "linear": linear}


def label_validation(
    loaded: LoadedModel,
    pairs: EvaluationSet,
    embedded: Embeddings,
    chosen: ChosenLabels,
    linear_pairs: int,
) -> Labelling | None:
    """Classify the images in ``embedded``, the embeddings of ``pairs``, by their labels.

    A linear classifier is trained for comparison, on at most ``linear_pairs`` training pairs.

    Returns:
        None if none of the images that can be used has one of the labels.
    """
    numbers = [chosen.number(pairs.labels[number]) for number in embedded.numbers]
    rows = [i for i, number in enumerate(numbers) if number is not None]
    if not rows:
        return None
    targets = torch.tensor([number for number in numbers if number is not None])
    vectors = label_embeddings(chosen.labels, chosen.templates, partial(embed_texts, loaded))
    test = Labelled(embedded.images[rows], targets)
    prompts = classify(test.features, targets, vectors, chosen.labels)
    linear = _linear(loaded, pairs.settings, test, chosen, linear_pairs) if linear_pairs else None
    return Labelling(chosen.labels, chosen.templates, vectors, prompts, linear)


def _linear(
    loaded: LoadedModel, settings: Settings, test: Labelled, chosen: ChosenLabels, most: int
) -> Linear | None:
    """Train a linear classifier on at most ``most`` training pairs and measure it on ``test``.

    Returns None without training pairs that have one of the labels.
    """
    folder = settings.data_dir / "train"
    if not tars_in(folder):
        return None
    pairs = open_pairs(folder, settings.max_train_pairs)
    template = CaptionTemplate.of(settings)
    said = describe(pairs, template, settings.label_field, None)
    targets = [chosen.number(description.label) for description in said]
    rows = [i for i, target in enumerate(targets) if target is not None]
    if not rows:
        return None
    drawn = np.random.default_rng(settings.seed).permutation(rows)[:most]
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    numbers = sorted(drawn.tolist())
    # Not cached: a cache of a random choice of pairs would hardly be used again
    encoding = live_encoding(loaded, preprocessing, settings)
    embedded = embed_pairs(loaded, ChosenPairs(pairs, numbers), encoding, settings)
    train = Labelled(embedded.images, torch.tensor([targets[n] for n in embedded.numbers]))
    return linear_classifier(train, test, chosen.labels, settings.seed)


def save_classifier(
    path: Path, loaded: LoadedModel, labelling: Labelling, checkpoint: Path | None
) -> None:
    """Write label vectors as safetensors, with all that is needed to classify by them.

    The tensor ``label_vectors`` is float32 [L, D]. The metadata holds ``format``, and as JSON
    ``labels``, ``templates``, ``logit_scale``, ``base_model`` and ``checkpoint``.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    from safetensors.torch import save_file

    said: dict[str, Any] = {
        "labels": labelling.labels,
        "templates": labelling.templates,
        "logit_scale": float(loaded.model.logit_scale.detach().exp()),
        "base_model": loaded.identity,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in said.items()}
    metadata = {"format": "clipft-classifier-1", **metadata}  # safetensors takes strings only
    with replacing(path) as temporary:
        save_file({"label_vectors": labelling.vectors.contiguous()}, str(temporary), metadata)
