"""Repeats a step that runs out of memory in smaller pieces.

First half as many activation graphs are kept, then a quarter, and so on. When only the first graph
of each tower is kept, the micro-batch is halved each time. The exact loss covers all pairs for any
size of the pieces, so it does not change; the local loss changes, and the warning says so. All
processes use the same smaller pieces, because their steps must match.

With sharded weights this is impossible, because other processes wait for this one inside a forward
pass. So the run ends, and can be resumed with other settings.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch.distributed as dist

from clipft.core.errors import MemoryShortage
from clipft.core.memory import give_back
from clipft.core.out_of_memory import memory_ran_out, no_second_attempt
from clipft.data.batch import Batch
from clipft.distributed.collectives import lost_process_error
from clipft.distributed.step_channel import StepAbandonedError, StepChannel
from clipft.models.trainable import TrainableModel


class Recovery:
    """How a step handles running out of memory. This base class does nothing."""

    def attempts(self, step: int) -> Iterator[AbstractContextManager[None]]:
        """Yield a context for each attempt to run the step, until one succeeds.

        ``for attempt in recovery.attempts(step): with attempt: ...`` repeats the step as long as
        the recovery can make something smaller.
        """
        yield nullcontext()

    def split(self, micro_batches: list[Batch]) -> list[Batch]:
        """Split the micro-batches into the size that fits in memory."""
        return micro_batches


@dataclass
class SmallerPieces(Recovery):
    """Keeps fewer graphs, then halves the micro-batches, down to ``smallest`` pairs.

    ``micro`` is the size of the loader's micro-batches. ``consequence`` says in the
    warning how smaller micro-batches affect the loss.
    """

    halve_graphs: Callable[[], bool]
    model: TrainableModel
    channel: StepChannel
    smallest: int
    consequence: str
    micro: int
    note: Callable[[str], None]
    _ran_out: bool = field(default=False, init=False)

    def attempts(self, step: int) -> Iterator[AbstractContextManager[None]]:
        """
        Raises:
            MemoryShortage: the smallest micro-batches do not fit either.
        """
        self._ran_out = True
        while self._ran_out:
            self._ran_out = False
            yield self._attempt()
            if self._ran_out:
                # Not where the error was caught, because its frames still held the memory there
                self.model.zero_grad(set_to_none=True)
                give_back(self.model.logit_scale.device)
                self._shrink(step)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        try:
            yield
        except StepAbandonedError:  # another process ran out
            self._ran_out = True
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            self.channel.abandon()
            self._ran_out = True

    def _shrink(self, step: int) -> None:
        where = f"memory ran out in step {step + 1}"
        if self.halve_graphs():
            self.note(
                f"warning: {where}: clipft now keeps half as many activation graphs, which makes "
                "each step slower."
            )
            return
        if self.micro <= self.smallest:
            raise MemoryShortage(
                f"{where} with micro-batches of {self.micro}, the smallest possible size",
                "use a machine with more memory, a smaller --effective-batch-size, "
                "--gradient-checkpointing, or a smaller model",
            )
        self.micro = -(-self.micro // 2)
        self.note(
            f"warning: {where}: using micro-batches of {self.micro} pairs from now on; "
            f"{self.consequence}."
        )

    def split(self, micro_batches: list[Batch]) -> list[Batch]:
        pieces = list[Batch]()
        for batch in micro_batches:
            if len(batch) <= self.micro:
                pieces.append(batch)
                continue
            for start in range(0, len(batch), self.micro):
                pieces.append(batch.part(slice(start, start + self.micro)))
        return pieces


class EndsRun(Recovery):
    """For sharded weights: a step is tried once, and running out of memory ends the run."""

    def attempts(self, step: int) -> Iterator[AbstractContextManager[None]]:
        yield sharded_pass()


@contextmanager
def sharded_pass() -> Iterator[None]:
    """Translate the errors of a block in which all processes fetch weights from each other.

    Raises:
        MemoryShortage: this process alone ran out of memory.
        ProcessError: another process ended.
    """
    where = ", and with --shard-weights a step cannot be repeated in smaller pieces"
    hint = "run `clipft resume` to continue from the last checkpoint, with a smaller "
    hint += "--micro-batch-size, --gradient-checkpointing, --graph-memory 0, or more processes"
    with no_second_attempt(where, hint):
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "/gloo/" in str(error)
            if lost and not memory_ran_out(error):
                raise lost_process_error(error) from error
            raise
