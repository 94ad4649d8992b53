"""Models + validation pairs -> evaluations, of one model or of two side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipft.config.settings import Settings
from clipft.core.common import checked, silent
from clipft.data.captions.metadata import describe
from clipft.data.captions.template import CaptionTemplate
from clipft.data.loader import Preprocessing
from clipft.data.overlap import same_images
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.embed import Embeddings, embed_pairs, validation_pairs
from clipft.embedding.encoding import open_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.metrics.definitions import DEFINITIONS
from clipft.metrics.relevance import Identities, normalized, numbered, relevance
from clipft.metrics.retrieval import Evaluation, EvaluationOptions, difference, evaluate
from clipft.models.pretrained import ModelInputs


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's embeddings of a set, and what they are worth."""

    embedded: Embeddings
    evaluation: Evaluation


@dataclass(frozen=True)
class EvaluationSet:
    """Pairs to measure on, and which of them belong together; read once for all models."""

    pairs: PairDataset
    preprocessing: Preprocessing
    settings: Settings
    identities: Identities
    labels: Sequence[str | None]

    @classmethod
    def of(
        cls, pairs: PairDataset, preprocessing: Preprocessing, settings: Settings
    ) -> "EvaluationSet":
        """
        Raises:
            UsageError: no pair has ``group_field``, or its groups are too large.
        """
        template = CaptionTemplate.parse(settings.caption)
        said = describe(pairs, template, settings.label_field, settings.group_field)
        groups = numbered(d.group for d in said) if settings.group_field else None
        captions = numbered(normalized(d.caption) for d in said)
        identities = Identities(captions, same_images(pairs), groups)
        relevance(identities)  # refuses here, not after hours of training
        return cls(pairs, preprocessing, settings, identities, [d.label for d in said])

    @classmethod
    def open(cls, inputs: ModelInputs, settings: Settings) -> "EvaluationSet":
        """The validation pairs of ``settings``.

        Raises:
            DataError, UsageError: there are none, or they do not fit the settings.
        """
        pairs = validation_pairs(settings)
        return cls.of(pairs, validation_preprocessing(inputs, pairs, settings), settings)

    def evaluate(
        self, loaded: LoadedModel, check: Callable[[], None] = lambda: None
    ) -> ModelEvaluation:
        """Embed all pairs with a model and measure. ``check`` is called between batches, and may
        end it by what it raises."""
        settings, progress = self.settings, checked(silent, check)
        how = open_encoding(
            loaded, self.pairs, self.preprocessing, settings, lambda note: None, progress
        )
        embedded = embed_pairs(loaded, self.pairs, how, settings, check=check)
        chosen = np.array(embedded.numbers)
        own = self.identities
        groups = None if own.groups is None else own.groups[chosen]
        device = loaded.precision.device
        where = device if device.type == "cuda" else "cpu"
        evaluation = evaluate(
            embedded.images.to(where),
            embedded.texts.to(where),
            Identities(own.captions[chosen], own.images[chosen], groups),
            [self.labels[number] for number in embedded.numbers],
            EvaluationOptions(settings.evaluation_bytes, settings.resamples, settings.seed),
        )
        return ModelEvaluation(embedded, evaluation)


@dataclass(frozen=True)
class Comparison:
    """The untouched model and the tuned one (None: nothing was tuned) on the same pairs."""

    before: Evaluation
    after: Evaluation | None

    def to_dict(self) -> dict[str, Any]:
        """``before``, ``after`` and ``difference`` as ``evaluation`` gives them, with the
        definitions of their figures."""
        return {
            "definitions": DEFINITIONS,
            "before": self.before.to_dict(),
            "after": self.after.to_dict() if self.after else None,
            "difference": difference(self.after, self.before) if self.after else None,
        }


def compare(
    pairs: EvaluationSet,
    before: LoadedModel,
    after: LoadedModel | None,
    check: Callable[[], None] = lambda: None,
) -> Comparison:
    """Evaluate both models; ``check`` as in ``EvaluationSet.evaluate``."""
    untouched = pairs.evaluate(before, check).evaluation
    return Comparison(untouched, pairs.evaluate(after, check).evaluation if after else None)
