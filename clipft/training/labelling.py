"""Classification of the validation pictures by prompts over labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipft.data.shards import PairDataset
from clipft.data.tokens import CaptionEncoder, padded
from clipft.errors import UsageError
from clipft.evaluation.classification import Classification, classify, label_embeddings
from clipft.evaluation.templates import TEMPLATES
from clipft.training.embedding import Embeddings
from clipft.training.loaded import LoadedModel


@dataclass(frozen=True)
class LabelSource:
    """Where labels come from: given (a list with commas, or a file), or a metadata field."""

    labels: str | None
    field: str
    templates: str


def classify_validation(
    loaded: LoadedModel, pairs: PairDataset, embedded: Embeddings, source: LabelSource
) -> Classification | None:
    """None where no pair carries one of the labels.

    Raises:
        UsageError: a file of labels or templates cannot be read, or a template has no {}.
    """
    named = [_label_of(pairs, number, source.field) for number in embedded.numbers]
    given = _lines(source.labels) if source.labels else None
    labels = given or sorted({name for name in named if name})
    known = {label.casefold(): i for i, label in enumerate(labels)}
    rows = [i for i, name in enumerate(named) if name and name.casefold() in known]
    if not rows:
        return None
    targets = torch.tensor([known[str(named[i]).casefold()] for i in rows])
    vectors = label_embeddings(labels, _templates(source.templates), _TextEncoder(loaded))
    return classify(embedded.images[rows], targets, vectors)


def _label_of(pairs: PairDataset, number: int, field: str) -> str | None:
    value = pairs.metadata(number).get(field)
    return value.strip() or None if isinstance(value, str) else None


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
            f"--templates {name}: no {{}} in {wrong[0] if wrong else 'it'!r}",
            f"name one of {', '.join(TEMPLATES)}, or a file with one template a line",
        )
    return templates


@dataclass(frozen=True)
class _TextEncoder:
    loaded: LoadedModel

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        model, precision = self.loaded.model.eval(), self.loaded.precision
        inputs = self.loaded.base.inputs
        encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
        ids = padded([encoded.ids for encoded in encoder(texts)], encoder.end)
        with precision.autocast():
            return model.encode_texts(ids.to(precision.device)).cpu()
