"""What a finished run has in its folder, besides its checkpoint. The work of one process."""

import json

from clipft.files import replacing_folder, write_text
from clipft.modelling.export import write_adapter
from clipft.training.checkpoint import load_checkpoint
from clipft.training.judging import EvaluationSet, compare, load_untouched
from clipft.training.loaded import LoadedModel
from clipft.training.restore import load_tuned
from clipft.training.result import TrainResult
from clipft.training.run_folder import RunPaths
from clipft.training.setup import RunSetup


def leave(result: TrainResult, setup: RunSetup, paths: RunPaths, judged_on: EvaluationSet) -> None:
    """The best epoch's adapter, its evaluation beside that of the untouched model, and the
    result.

    Raises:
        StorageError: the disk is full or refuses.
    """
    loaded = _with_best(result, setup, paths)
    tuned = loaded if result.best else None
    judged = compare(judged_on, load_untouched(setup.settings), tuned)
    text = json.dumps(judged.to_dict(), indent=2, ensure_ascii=False)
    write_text(paths.evaluation, text + "\n")
    write_text(paths.result, json.dumps(result.to_dict(), indent=2) + "\n")


def _with_best(result: TrainResult, setup: RunSetup, paths: RunPaths) -> LoadedModel:
    """The best epoch's weights in the model, and for others' tools in the run folder."""
    settings, loaded = setup.settings, setup.loaded
    best = paths.best if result.best and paths.best.exists() else None
    if setup.weights.sharded:  # whole once more: the other processes are not here
        return load_tuned(load_checkpoint(best or paths.checkpoint), settings)
    if best:
        loaded.model.load_trainable_state(load_checkpoint(best)["model_state_dict"])
    if settings.declared_scenario.lora:
        with replacing_folder(paths.adapter) as temporary:
            write_adapter(loaded.model, settings.model, temporary)
    return loaded
