"""Classification of the validation pictures: by prompts over labels, and linearly."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.errors import ModelError, UsageError
from clipft.core.files import replacing
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import CaptionTemplate
from clipft.data.shards.dataset import ChosenPairs, open_pairs
from clipft.embedding.embed import Embeddings, embed_pairs, embed_texts
from clipft.embedding.encoding import live_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
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
    """Where labels come from: given (a list with commas, or a file), or the metadata.
    ``linear_pairs`` training pairs at most are for the linear classifier; 0: none."""

    labels: str | None
    templates: str
    linear_pairs: int


@dataclass(frozen=True)
class Labelling:
    """Labels and their unit vectors, float32 [L, D], with the prompts that they are made of."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Tensor
    prompts: Classification
    linear: Linear | None

    def to_dict(self, settings: Settings) -> dict[str, Any]:
        how = settings.resamples, settings.seed
        linear = self.linear.to_dict(*how) if self.linear else None
        prompts = self.prompts.to_dict(*how)
        return {**prompts, "templates": list(self.templates), "linear": linear}


def label_validation(
    loaded: LoadedModel, pairs: EvaluationSet, embedded: Embeddings, source: LabelSource
) -> Labelling | None:
    """None where no pair carries one of the labels.

    Raises:
        UsageError: a file of labels or templates cannot be read, or a template has no {}.
    """
    templates = _templates(source.templates)
    named = [pairs.labels[number] for number in embedded.numbers]
    given = _lines(source.labels) if source.labels else None
    labels = list(dict.fromkeys(given or sorted({name for name in named if name})))
    known = {label.casefold(): i for i, label in enumerate(labels)}
    numbers = [_number(name, known) for name in named]
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


def _number(name: str | None, known: dict[str, int]) -> int | None:
    return known.get(name.casefold()) if name else None


def _linear(
    loaded: LoadedModel, settings: Settings, test: Labelled, known: dict[str, int], most: int
) -> Linear | None:
    """None without labelled training pairs."""
    folder = settings.data_dir / "train"
    if not any(folder.glob("*.tar")):
        return None
    pairs = open_pairs(folder, settings.max_train_pairs)
    template = CaptionTemplate.parse(settings.caption)
    said = describe(pairs, template, settings.label_field, None)
    targets = [_number(description.label, known) for description in said]
    rows = [i for i, target in enumerate(targets) if target is not None]
    if not rows:
        return None
    chosen = np.random.default_rng(settings.seed).permutation(rows)[:most]
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    numbers = sorted(chosen.tolist())
    how = live_encoding(loaded, preprocessing, settings.seed)
    embedded = embed_pairs(loaded, ChosenPairs(pairs, numbers), how, settings)
    train = Labelled(embedded.images, torch.tensor([targets[n] for n in embedded.numbers]))
    return linear_classifier(train, test, list(known), settings.seed)


def _lines(given: str) -> list[str]:
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else given.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {given}: {error}", "give a UTF-8 text file") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _templates(name: str) -> Sequence[str]:
    templates = TEMPLATES.get(name) or _lines(name)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UsageError(
            f"--templates {name}: {f'no {{}} in {wrong[0]!r}' if wrong else 'there is none'}",
            f"name one of {', '.join(TEMPLATES)}, or a file with one template a line",
        )
    return templates


FORMAT = "clipft-classifier-1"


@dataclass(frozen=True)
class Classifier:
    """As it stands in the file."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Tensor
    logit_scale: float
    base_model: dict[str, str]
    checkpoint: str | None


def classifier_of(loaded: LoadedModel, labelling: Labelling, checkpoint: Path | None) -> Classifier:
    return Classifier(
        labelling.labels,
        labelling.templates,
        labelling.vectors,
        float(loaded.model.logit_scale.detach().exp()),
        loaded.identity,
        str(checkpoint) if checkpoint else None,
    )


def save_classifier(path: Path, classifier: Classifier) -> None:
    """
    Raises:
        StorageError: the disk is full or refuses.
    """
    from safetensors.torch import save_file

    said: dict[str, Any] = {
        name: getattr(classifier, name)
        for name in ("labels", "templates", "logit_scale", "base_model", "checkpoint")
    }
    words = {name: json.dumps(value, ensure_ascii=False) for name, value in said.items()}
    with replacing(path) as temporary:
        vectors = classifier.vectors.contiguous()
        save_file({"label_vectors": vectors}, str(temporary), {"format": FORMAT, **words})


def load_classifier(path: Path) -> Classifier:
    """
    Raises:
        ModelError: missing, broken, or no classifier.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            words = file.metadata() or {}
            if words.get("format") != FORMAT:
                raise ModelError(f"{path} is no classifier of clipft", _HINT)
            vectors = file.get_tensor("label_vectors")
        said = {name: json.loads(value) for name, value in words.items() if name != "format"}
        labels, templates = tuple(said.pop("labels")), tuple(said.pop("templates"))
        return Classifier(labels, templates, vectors, **said)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {path}: {' '.join(str(error).split())}", _HINT) from error


_HINT = "make it with `clipft zero-shot --save-classifier FILE`"
