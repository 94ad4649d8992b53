"""Measures the model on the validation pairs during a run, and writes the results at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.files import replacing, write_json
from clipft.data.captions.table import CaptionTable
from clipft.data.skipped import Skipped
from clipft.distributed.rank_zero import on_rank_zero
from clipft.embedding.embed import Embeddings, embed_pairs
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.accuracy import PromptClassifier
from clipft.evaluation.evaluator import EvaluationSet, compare
from clipft.evaluation.gallery import Rankings, data_name
from clipft.evaluation.rankings import CaptionGroups, rank_images
from clipft.export.target import why_no_adapter
from clipft.metrics.ranking import drawn_queries, retrieval
from clipft.models.huggingface import write_adapter
from clipft.runs.folder import RunPaths
from clipft.runs.load import load_fine_tuned
from clipft.runs.records import EpochResult
from clipft.training.checkpointing import load_best
from clipft.training.setup import RunSetup
from clipft.training.state import TrainResult


@dataclass
class Validation:
    """The validation pairs of a run, and what is needed to measure the model on them."""

    setup: RunSetup
    evaluation_set: EvaluationSet
    rank: Callable[[Embeddings], Rankings]
    classifier: PromptClassifier | None
    rankings: Rankings | None = None
    """The rankings of the last measured epoch. Only rank zero has them."""

    @classmethod
    def of(cls, setup: RunSetup) -> "Validation":
        """Prepare the validation pairs.

        Raises:
            UsageError: labels or prompts do not fit the pairs.
        """
        evaluation_set = EvaluationSet.of(setup.val, setup.val_preprocessing, setup.settings)
        captions = setup.val_preprocessing.captions
        assert isinstance(captions, CaptionTable)  # only training pairs may be a stream
        rank = partial(rank_images, captions=CaptionGroups.of(captions), data=data_name(setup.val))
        labels, tower = evaluation_set.labels, setup.text_tower()
        return cls(setup, evaluation_set, rank, PromptClassifier.of(setup.settings, labels, tower))

    def measure(
        self, epoch: int, step: int, train_loss: float | None, check_stop: Callable[[], None]
    ) -> tuple[EpochResult, Sequence[Skipped]]:
        """Embed the validation pairs on all processes; rank zero computes the figures.

        Returns:
            The figures, on all processes, and the pairs that could not be used.
        """
        setup = self.setup
        embedded = embed_pairs(
            setup.loaded,
            setup.val,
            setup.val_encoding,
            setup.settings,
            setup.val_positives,
            setup.processes,
            check_stop,
            setup.validation_batch,
        )
        labels = self.classifier.label_vectors(setup.loaded) if self.classifier else None
        result = on_rank_zero(
            setup.processes, lambda: self._figures(epoch, step, train_loss, embedded, labels)
        )
        return result, embedded.skipped

    def _figures(
        self,
        epoch: int,
        step: int,
        train_loss: float | None,
        embedded: Embeddings,
        labels: Tensor | None,
    ) -> EpochResult:
        setup, settings = self.setup, self.setup.settings
        ranked = embedded.where_ranked(setup.loaded.precision.device)
        asked = drawn_queries(len(ranked.images), settings.evaluation_queries, settings.seed)
        found = retrieval(
            ranked.images, ranked.texts, settings.evaluation_bytes, ranked.owners, asked
        ).to_dict()
        self.rankings = self.rank(embedded)
        accuracy = None
        if self.classifier and labels is not None:
            accuracy = self.classifier.accuracy(embedded, labels)
        return EpochResult(
            epoch,
            step,
            train_loss,
            setup.validation_loss(ranked.of(asked)),
            found,
            val_floor=setup.loss_lower_bound(embedded.of(asked)),
            accuracy=accuracy,
        )

    def write_rankings(self, path: Path) -> None:
        """Write the rankings of the last measurement. Only rank zero may call this."""
        assert self.rankings
        self.rankings.write(path)


def write_results(
    validation: Validation, paths: RunPaths, result: TrainResult, check_stop: Callable[[], None]
) -> None:
    """Evaluate the best epoch and the pretrained model, and write the results.

    Only rank zero may call this. ``result.json`` is written last. If a signal interrupts this
    between two batches, the file is missing, and a resumed run repeats all of it.
    """
    setup = validation.setup
    settings = setup.settings.model_copy(update={"precision": setup.loaded.precision.name})
    best = _best_model(setup, settings, paths, result)
    model = best or setup.loaded
    if not why_no_adapter(settings, model.base.architecture.not_exported):
        with replacing(paths.adapter) as temporary:
            write_adapter(model.model, settings.model, temporary)
    pretrained = load_model(settings, pretrained=True)
    compared = compare(validation.evaluation_set, pretrained, best, check_stop)
    write_json(paths.evaluation, compared.to_dict(), indent=2, ascii_only=False)
    write_json(paths.result, result.to_dict(), indent=2)


def _best_model(
    setup: RunSetup, settings: Settings, paths: RunPaths, result: TrainResult
) -> LoadedModel | None:
    """Return the model of the best epoch; None if nothing was trained."""
    if not result.best:
        return None
    content = load_best(paths.best, result.best.epoch)
    if setup.weights.sharded:  # load all weights, because other processes are not here
        return load_fine_tuned(content, settings)
    setup.loaded.model.load_trainable_state(content["model_state_dict"])
    return setup.loaded
