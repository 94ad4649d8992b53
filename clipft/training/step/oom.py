"""When memory runs out in a step: the same step in smaller chunks.

First no graphs are kept from then on, then micro-batches are cut in two, and again. The exact
loss is over all pairs however they are cut, so nothing else changes; what it means for the
local one is said. All processes shrink together, or their steps would not fit each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clipft.core.errors import MemoryShortage
from clipft.core.memory import give_back
from clipft.data.loader import Batch
from clipft.distributed.collectives import Processes, StepAbandonedError
from clipft.models.trainable import TrainableModel
from clipft.training.step.gradcache import Accumulation, ActivationBudget, Cutting

_CPU_REFUSALS = ("can't allocate memory", "not enough memory", "could not create a primitive")
"""Of torch's CPU allocator and of oneDNN, whose errors are plain RuntimeErrors."""


def memory_ran_out(error: BaseException) -> bool:
    """Did the device or the system refuse memory?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _CPU_REFUSALS)


@dataclass
class ShrinkingAccumulation:
    """``accumulate``, and what to do when it runs out of memory. ``micro`` is the micro-batch
    that the steps come in; ``note`` tells the user."""

    accumulate: Accumulation
    graphs: ActivationBudget
    model: TrainableModel
    processes: Processes
    cutting: Cutting
    micro: int
    note: Callable[[str], None]
    _released: bool = field(default=False, init=False)

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        """
        Raises:
            MemoryShortage: there is not even room for the fewest pairs that can be learned from.
        """
        while (loss := self._attempt(step, self._cut(micro_batches))) is None:
            # Here, not where it was caught: the error's frames hold the memory
            self.model.zero_grad(set_to_none=True)
            give_back(self.model.logit_scale.device)
            self._shrink(step)
        return loss

    def floor(self, micro_batches: list[Batch]) -> float:
        return self.accumulate.floor(self._cut(micro_batches))

    def _attempt(self, step: int, micro_batches: list[Batch]) -> Tensor | None:
        try:
            return self.accumulate(step, micro_batches)
        except StepAbandonedError:
            return None
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            self.processes.abandon_step()
            return None

    def _shrink(self, step: int) -> None:
        where = f"memory ran out in step {step + 1}"
        if not self._released:
            self._released = True
            self.graphs.release()
            self.note(f"warning: {where}: graphs are not kept from now on, which is slower.")
            return
        if self.micro <= self.cutting.least:
            raise MemoryShortage(
                f"{where}, with micro-batches of {self.micro}, the fewest that can be learned from",
                "use a machine with more memory, a smaller --effective-batch-size, "
                "--gradient-checkpointing, or a smaller model",
            )
        self.micro = -(-self.micro // 2)
        self.note(
            f"warning: {where}: micro-batches are of {self.micro} pairs from now on; "
            f"{self.cutting.consequence}."
        )

    def _cut(self, micro_batches: list[Batch]) -> list[Batch]:
        return [chunk for batch in micro_batches for chunk in pieces_of(batch, self.micro)]


def pieces_of(batch: Batch, most: int) -> Sequence[Batch]:
    """``batch`` in chunks of at most ``most`` pairs."""
    if len(batch) <= most:
        return [batch]
    return [
        replace(
            batch,
            pixel_values=batch.pixel_values[i : i + most],
            input_ids=batch.input_ids[i : i + most],
            numbers=batch.numbers[i : i + most],
            skipped=(),
        )
        for i in range(0, len(batch), most)
    ]
