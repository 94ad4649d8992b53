"""The steps of a run from where it is, without the pairs that cannot be used."""

from collections.abc import Iterator
from dataclasses import asdict

from clipft.data.loader import StepBatch, training_batches
from clipft.core.errors import DataError
from clipft.training.bad_pairs import BadPairs
from clipft.training.setup import RunSetup
from clipft.training.shared_steps import agreed
from clipft.training.loop import TrainState
from clipft.words import counted


def run_steps(setup: RunSetup, state: TrainState, bad: BadPairs) -> Iterator[StepBatch]:
    """
    Raises:
        DataError: none of a step's pairs can be used; they are listed among the ``bad``.
    """
    batches = training_batches(
        setup.train,
        setup.encoding.preprocessing,
        setup.epoch_plan,
        state.position,
        setup.plan.epochs,
        setup.loader_options,
    )
    for batch in agreed(setup.processes, batches):
        if not batch.pairs:
            skipped = [asdict(skipped) for skipped in batch.skipped]
            bad.met(batch.epoch + 1, state.step, skipped)
            pairs = counted(len(batch.skipped), "pair")
            raise DataError(
                f"none of the {pairs} of step {state.step + 1} can be used",
                f"see {bad.path}; mend the data, or take a larger --effective-batch-size",
            )
        yield batch
