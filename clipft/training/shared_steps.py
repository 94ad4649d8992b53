"""The steps of a run, as all of its processes know them."""

from collections.abc import Iterator
from dataclasses import replace

from clipft.data.loader import StepBatch
from clipft.training.distributed import Processes, together


def agreed(processes: Processes, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """Each process's part of each step, with the pairs and the skipped of all.

    Raises:
        DataError: one of them cannot read its part.
    """
    while batch := together(processes, lambda: next(batches, None)):
        told = processes.gather_objects((batch.pairs, batch.skipped))
        skipped = [entry for _, entries in told for entry in entries]
        yield replace(batch, skipped=skipped, pairs=sum(pairs for pairs, _ in told))
