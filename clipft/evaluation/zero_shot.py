"""Classifies the validation images by prompts over labels, and with a linear classifier."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.files import replacing
from clipft.data.shards.names import tars_in
from clipft.embedding.embed import Embeddings, embed_texts
from clipft.embedding.load import LoadedModel
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.labels import ChosenLabels
from clipft.evaluation.training_features import training_features
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
        None if no usable image has one of the labels.
    """
    numbers = [chosen.number(pairs.labels[number]) for number in embedded.numbers]
    rows = [i for i, number in enumerate(numbers) if number is not None]
    if not rows:
        return None
    targets = torch.tensor([number for number in numbers if number is not None])
    names = chosen.labels
    vectors = label_embeddings(names, chosen.templates, partial(embed_texts, loaded))
    test = Labelled(embedded.images[rows], targets)
    prompts = classify(test.features, targets, vectors, names)
    linear = None
    if linear_pairs and tars_in(pairs.settings.data_dir / "train"):
        train = training_features(loaded, pairs.settings, chosen, linear_pairs)
        linear = linear_classifier(train, test, names, pairs.settings.seed) if train else None
    return Labelling(chosen.labels, chosen.templates, vectors, prompts, linear)


def save_classifier(
    path: Path, loaded: LoadedModel, labelling: Labelling, checkpoint: Path | None
) -> None:
    """Write label vectors as safetensors, with everything that classification needs.

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
