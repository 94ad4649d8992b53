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
from clipft.core.errors import UsageError
from clipft.core.files import replacing
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import CaptionTemplate
from clipft.data.shards.dataset import ChosenPairs, open_pairs
from clipft.embedding.embed import Embeddings, embed_pairs, embed_texts, evaluation_batch
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import choose_shapes
from clipft.evaluation.evaluator import EvaluationSet
from clipft.metrics.classification import (
    TEMPLATES,
    Classification,
    Labelled,
    Linear,
    classify,
    label_embeddings,
    linear_classifier,
)


@dataclass(frozen=True)
class LabelSource:
    """Where labels and prompts come from.

    ``labels`` are given as a list separated by commas or as a file with one per line; None takes
    the labels in the metadata. ``templates`` is a name in ``TEMPLATES`` or a file. The linear
    classifier is trained on at most ``linear_pairs`` pairs, and left out if that is 0.
    """

    labels: str | None
    templates: str
    linear_pairs: int


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
    loaded: LoadedModel, pairs: EvaluationSet, embedded: Embeddings, source: LabelSource
) -> Labelling | None:
    """Classify the images in ``embedded``, the embeddings of ``pairs``, by their labels.

    Returns:
        None if no pair has one of the labels. Upper and lower case are not told apart.

    Raises:
        UsageError: a file of labels or templates cannot be read, or a template has no {}.
    """
    templates = TEMPLATES.get(source.templates) or _lines(source.templates)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UsageError(
            f"--templates {source.templates}: "
            + (f"there is no {{}} in {wrong[0]!r}" if wrong else "it has no templates"),
            f"name one of {', '.join(TEMPLATES)}, or a file with one template per line",
        )
    named = [pairs.labels[number] for number in embedded.numbers]
    given = _lines(source.labels) if source.labels else None
    labels = list(dict.fromkeys(given or sorted({name for name in named if name})))
    known = {label.casefold(): i for i, label in enumerate(labels)}
    numbers = [known.get((name or "").casefold()) for name in named]
    rows = [i for i, number in enumerate(numbers) if number is not None]
    if not rows:
        return None
    targets = torch.tensor([number for number in numbers if number is not None])
    vectors = label_embeddings(labels, templates, partial(embed_texts, loaded))
    test = Labelled(embedded.images[rows], targets)
    prompts = classify(test.features, targets, vectors, labels)
    linear = None
    if source.linear_pairs:
        linear = _linear(loaded, pairs.settings, test, known, source.linear_pairs)
    return Labelling(tuple(labels), tuple(templates), vectors, prompts, linear)


def _linear(
    loaded: LoadedModel, settings: Settings, test: Labelled, known: dict[str, int], most: int
) -> Linear | None:
    """Train a linear classifier on at most ``most`` training pairs and measure it on ``test``.

    ``known`` maps labels in lower case to their numbers. Returns None without training pairs
    that have one of them.
    """
    folder = settings.data_dir / "train"
    if not any(folder.glob("*.tar")):
        return None
    pairs = open_pairs(folder, settings.max_train_pairs)
    template = CaptionTemplate.parse(settings.caption)
    said = describe(pairs, template, settings.label_field, None)
    targets = [known.get((description.label or "").casefold()) for description in said]
    rows = [i for i, target in enumerate(targets) if target is not None]
    if not rows:
        return None
    chosen = np.random.default_rng(settings.seed).permutation(rows)[:most]
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    numbers = sorted(chosen.tolist())
    at_once = evaluation_batch(settings, loaded.precision.device)
    shapes = choose_shapes(loaded, settings.compile, at_once, at_once)
    # Not cached: a cache of a random choice of pairs would hardly be used again
    encoding = live_encoding(loaded, preprocessing, settings, shapes)
    embedded = embed_pairs(loaded, ChosenPairs(pairs, numbers), encoding, settings)
    train = Labelled(embedded.images, torch.tensor([targets[n] for n in embedded.numbers]))
    return linear_classifier(train, test, list(known), settings.seed)


def _lines(given: str) -> list[str]:
    """Read a list separated by commas, or a file with one entry per line."""
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else given.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {given}: {error}", "give a UTF-8 text file") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


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
