"""A classifier by prompts as one safetensors file, to be used without clipft.

Tensor ``label_vectors`` float32 [L, D]: unit vectors; an image's label is that of the largest
dot product with its embedding. In the header's metadata, as JSON: ``labels`` (L names in
order), ``templates``, ``base_model`` (name, fingerprint), ``checkpoint`` (of the tuned weights,
or null), ``logit_scale`` (probabilities are softmax(logit_scale * products)).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipft.core.errors import ModelError
from clipft.core.files import replacing
from clipft.evaluation.zero_shot import Labelling
from clipft.embedding.load import LoadedModel

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
