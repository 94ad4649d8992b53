"""Evaluates models on validation pairs: one model, or two side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipft.config.settings import Settings
from clipft.core.common import checked, silent
from clipft.data.captions.cleaning import compared
from clipft.data.captions.metadata import check_label_field, describe
from clipft.data.captions.template import DEFAULT_TEMPLATE, CaptionTemplate
from clipft.data.decoding import Preprocessing
from clipft.data.overlap import same_images
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import evaluation_pairs
from clipft.embedding.embed import Embeddings, embed_pairs
from clipft.embedding.encoding import open_encoding, validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.evaluation.accuracy import Accuracies, compare_accuracy
from clipft.metrics.definitions import DEFINITIONS
from clipft.metrics.relevance import Identities, numbered, relevance
from clipft.metrics.retrieval import Evaluation, EvaluationOptions, difference, evaluate
from clipft.models.pretrained import ModelInputs

SPLIT_TITLES = {"val": "Validation", "test": "Test"}


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's embeddings of a set of pairs, and the figures measured from them."""

    embedded: Embeddings
    evaluation: Evaluation


@dataclass(frozen=True)
class EvaluationSet:
    """Pairs for an evaluation, and which of them belong together. It is read once for all models.

    ``labels`` holds the category of each pair, or None. ``split`` is "val" or "test".
    """

    pairs: PairDataset
    preprocessing: Preprocessing
    settings: Settings
    identities: Identities
    labels: Sequence[str | None]
    split: str = "val"

    @classmethod
    def of(
        cls,
        pairs: PairDataset,
        preprocessing: Preprocessing,
        settings: Settings,
        split: str = "val",
    ) -> "EvaluationSet":
        """Find out from captions, images and metadata which pairs belong together.

        Raises:
            UsageError: no pair has ``group_field`` or the chosen ``label_field``, or the groups
                are too large.
        """
        template = CaptionTemplate.of(settings)
        template = template.for_evaluation()
        fields = (settings.label_field, settings.group_field, settings.grade_field)
        said = describe(pairs, template, *fields)
        check_label_field(settings.label_field, said, pairs)
        groups = numbered(d.group for d in said) if settings.group_field else None
        captions = numbered(compared(text) for d in said for text in d.captions)
        owners = np.repeat(np.arange(len(said)), [len(d.captions) for d in said])
        grades = np.array([d.grade for d in said]) if settings.grade_field else None
        identities = Identities(captions, same_images(pairs), groups, owners, grades)
        relevance(identities)  # refuses too large groups now and not after the training
        return cls(pairs, preprocessing, settings, identities, [d.label for d in said], split)

    @classmethod
    def open(cls, inputs: ModelInputs, settings: Settings, split: str = "auto") -> "EvaluationSet":
        """Open the test or the validation pairs of ``settings`` for models that take ``inputs``.
        ``evaluation_pairs`` chooses the pairs.

        Raises:
            DataError: there are no pairs, or they cannot be read.
            UsageError: as for ``of``.
        """
        which, pairs = evaluation_pairs(settings, split)
        return cls.of(pairs, validation_preprocessing(inputs, pairs, settings), settings, which)

    @property
    def caption(self) -> str:
        """The template or the field of the captions that are measured."""
        return CaptionTemplate.of(self.settings).first

    @property
    def title(self) -> str:
        """The name of the split, for the user."""
        return SPLIT_TITLES[self.split]

    def evaluate(
        self, loaded: LoadedModel, check: Callable[[], None] = lambda: None
    ) -> ModelEvaluation:
        """Embed all pairs with a model and measure retrieval.

        ``check`` is called between batches and may stop the evaluation by raising an error.
        """
        settings, progress = self.settings, checked(silent, check)
        preprocessing = self.preprocessing
        if loaded.base.sizes != settings.input_sizes:  # the pretrained model, as it was published
            preprocessing = validation_preprocessing(loaded.base.inputs, self.pairs, settings)
        encoding = open_encoding(
            loaded, self.pairs, preprocessing, settings, lambda note: None, progress=progress
        )
        embedded = embed_pairs(loaded, self.pairs, encoding, settings, check=check)
        ranked = embedded.where_ranked(loaded.precision.device)
        evaluation = evaluate(
            ranked.images,
            ranked.texts,
            self.identities.of(np.array(embedded.numbers)),  # without the skipped pairs
            [self.labels[number] for number in embedded.numbers],
            EvaluationOptions(
                settings.evaluation_bytes,
                settings.resamples,
                settings.seed,
                settings.dimensions,
                settings.evaluation_queries,
            ),
        )
        return ModelEvaluation(embedded, evaluation)


@dataclass(frozen=True)
class Comparison:
    """The pretrained and the fine-tuned model on the same pairs.

    ``after`` is None if nothing was trained. ``caption`` is the template of the captions.
    ``accuracy`` is only there for a model that is trained on labels.
    """

    before: Evaluation
    after: Evaluation | None
    caption: str = DEFAULT_TEMPLATE.source
    accuracy: Accuracies | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values of evaluation.json, with the definitions of its figures."""
        return {
            "caption": self.caption,
            "definitions": DEFINITIONS,
            "before": self.before.to_dict(),
            "after": self.after.to_dict() if self.after else None,
            "difference": difference(self.after, self.before) if self.after else None,
            **({"classification": self.accuracy.to_dict()} if self.accuracy else {}),
        }


def compare(
    pairs: EvaluationSet,
    pretrained: LoadedModel,
    fine_tuned: LoadedModel | None,
    check: Callable[[], None] = lambda: None,
) -> Comparison:
    """Evaluate both models on the same pairs; ``check`` as in ``EvaluationSet.evaluate``."""
    before = pairs.evaluate(pretrained, check)
    after = pairs.evaluate(fine_tuned, check) if fine_tuned else None
    accuracy = compare_accuracy(
        pairs.settings,
        pairs.labels,
        (pretrained, before.embedded),
        (fine_tuned, after.embedded) if fine_tuned and after else None,
    )
    fine = after.evaluation if after else None
    return Comparison(before.evaluation, fine, pairs.caption, accuracy)
