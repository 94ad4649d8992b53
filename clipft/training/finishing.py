"""What a run that has ended leaves in its folder, besides what it wrote on its way."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from clipft.core.files import replacing_folder, write_text
from clipft.models.huggingface import write_adapter
from clipft.runs.records import EpochResult
from clipft.training.best_weights import load_best
from clipft.evaluation.evaluator import EvaluationSet, compare, load_untouched
from clipft.embedding.load import LoadedModel
from clipft.runs.load import load_tuned
from clipft.training.result import TrainResult
from clipft.runs.folder import RunPaths
from clipft.training.setup import RunSetup


@dataclass(frozen=True)
class Finish:
    """The end of one run; the work of one process. ``check`` may end it between batches by what
    it raises: ``result.json`` is then missing, and the resumed run does all of it again."""

    setup: RunSetup
    paths: RunPaths
    judged_on: EvaluationSet
    check: Callable[[], None]

    def leave(self, result: TrainResult) -> None:
        """
        Raises:
            StorageError, ModelError: a disk is full; the best epoch's weights are damaged.
            Interrupted: as ``check`` has it.
        """
        loaded = self._with_best(result.best)
        self._evaluate(loaded if result.best else None)
        write_text(self.paths.result, json.dumps(result.to_dict(), indent=2) + "\n")

    def _with_best(self, best: EpochResult | None) -> LoadedModel:
        """The best epoch's weights in the model, and for others' tools in the run folder."""
        settings, loaded = self.setup.settings, self.setup.loaded
        if best:
            content = load_best(self.paths.best, best.epoch)
            if self.setup.weights.sharded:  # whole once more: the other processes are not here
                return load_tuned(content, settings)
            loaded.model.load_trainable_state(content["model_state_dict"])
        if settings.declared_scenario.lora:
            with replacing_folder(self.paths.adapter) as temporary:
                write_adapter(loaded.model, settings.model, temporary)
        return loaded

    def _evaluate(self, tuned: LoadedModel | None) -> None:
        """All figures of the untouched model and of the best epoch, with intervals."""
        untouched = load_untouched(self.setup.settings)
        judged = compare(self.judged_on, untouched, tuned, self.check)
        text = json.dumps(judged.to_dict(), indent=2, ensure_ascii=False)
        write_text(self.paths.evaluation, text + "\n")
