"""Writes the results of a run: the adapter, the evaluation of the best epoch, and the result."""

from collections.abc import Callable

from clipft.core.files import replacing, write_json
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import EvaluationSet, compare
from clipft.export.target import why_no_adapter
from clipft.models.huggingface import write_adapter
from clipft.runs.folder import RunPaths
from clipft.runs.load import load_fine_tuned
from clipft.training.checkpointing import load_best
from clipft.training.setup import RunSetup
from clipft.training.state import TrainResult


def write_results(
    setup: RunSetup,
    paths: RunPaths,
    evaluation_set: EvaluationSet,
    result: TrainResult,
    check_stop: Callable[[], None],
) -> None:
    """Evaluate the best epoch and the pretrained model, and write the results.

    Only rank zero may call this. ``result.json`` is written last. If a signal interrupts this
    between two batches, the file is missing, and a resumed run repeats all of it.
    """
    precision = setup.loaded.precision.name
    settings = setup.settings.model_copy(update={"precision": precision})
    best = _best_model(setup, paths, result)
    model = best or setup.loaded
    if not why_no_adapter(settings, model.base.architecture.not_exported):
        with replacing(paths.adapter) as temporary:
            write_adapter(model.model, settings.model, temporary)
    pretrained = load_model(settings, pretrained=True)
    compared = compare(evaluation_set, pretrained, best, check_stop)
    write_json(paths.evaluation, compared.to_dict(), indent=2, ascii_only=False)
    write_json(paths.result, result.to_dict(), indent=2)


def _best_model(setup: RunSetup, paths: RunPaths, result: TrainResult) -> LoadedModel | None:
    """Return the model of the best epoch; None if nothing was trained."""
    if not result.best:
        return None
    content = load_best(paths.best, result.best.epoch)
    if setup.weights.sharded:  # load all weights, because other processes are not here
        precision = setup.loaded.precision.name
        return load_fine_tuned(content, setup.settings.model_copy(update={"precision": precision}))
    setup.loaded.model.load_trainable_state(content["model_state_dict"])
    return setup.loaded
