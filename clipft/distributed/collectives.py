"""The collectives between the processes of a run.

``Processes`` is a run of one process, in which every collective is trivial.
``DistributedProcesses`` uses torch.distributed. Inside a training step, processes communicate
through ``step_channel.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clipft.core.common import Note
from clipft.core.errors import ProcessError
from clipft.core.out_of_memory import memory_ran_out
from clipft.distributed.waiting import Roll

T = TypeVar("T")

_MAX_DIMENSIONS = 6
"""Of the tensors that ``gather_rows`` takes."""


@dataclass(eq=False)
class Processes:
    """The processes of a run. This base class is a run of a single process: it has nobody to
    gather from and nothing to wait for.

    All processes must call the same methods in the same order. With several processes every
    collective raises ``ProcessError`` when another process ends, or does not answer in time.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Processes on this machine, which share its memory, processors and disks."""

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes, in the order of their ranks.

        Args:
            rows: [n_i, ...] on each process, all of one dtype. ``n_i`` may differ and may be 0;
                an empty tensor does not need to have the other dimensions right.

        Returns:
            [sum of n_i, ...] on every process. Gradients do not flow through.
        """
        return rows.detach()

    def gather_integers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of all processes, as many on each, in the order of their ranks."""
        return [list(numbers)]

    def any(self, flag: bool) -> bool:
        """Return True if ``flag`` is true on at least one process."""
        return flag

    def gather_objects(self, value: T) -> list[T]:
        """Return the (pickled) values of all processes in the order of their ranks."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Return rank zero's (pickled) value. There is no timeout for rank zero."""
        return value

    def barrier(self) -> None:
        """Wait without a timeout until all processes have called this."""


ALONE = Processes()
"""A run of one process."""


@dataclass(eq=False)
class DistributedProcesses(Processes):
    """Processes that talk over torch's default group: gloo for CPU tensors, NCCL for CUDA's.

    ``patient_group`` is a gloo group without a timeout, for work of unknown duration. ``roll``
    tells which processes are missing there, in lines for ``note``. A process that ends closes its
    sockets, which the others notice at once.
    """

    patient_group: Any = None
    roll: Roll | None = None
    note: Note = lambda text: None

    def gather_rows(self, rows: Tensor) -> Tensor:
        rows = rows.detach()
        unused = [0] * (_MAX_DIMENSIONS - rows.ndim)
        headers = self.gather_integers([rows.ndim, *rows.shape, *unused])
        shapes = [header[1 : 1 + header[0]] for header in headers]
        counts = [shape[0] for shape in shapes]
        if not any(counts):
            return rows
        row_shape = next(shape[1:] for shape in shapes if shape[0])
        # all_gather wants equal shapes: pad to the longest, and cut the padding off below
        padded = rows.new_zeros(max(counts), *row_shape)
        padded[: len(rows)] = rows.reshape(len(rows), *row_shape)
        parts = [torch.empty_like(padded) for _ in counts]
        with lost_process_errors():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_integers(self, numbers: Sequence[int]) -> list[list[int]]:
        ours = torch.tensor(numbers, dtype=torch.int64)
        theirs = [torch.empty_like(ours) for _ in range(self.world_size)]
        with lost_process_errors():
            dist.all_gather(theirs, ours)
        return [other.tolist() for other in theirs]

    def any(self, flag: bool) -> bool:
        return any(theirs for [theirs] in self.gather_integers([int(flag)]))

    def gather_objects(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with lost_process_errors():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        values: list[Any] = [value]
        with lost_process_errors():
            dist.broadcast_object_list(
                values, src=0, group=self.patient_group, device=torch.device("cpu")
            )
        return values[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        with lost_process_errors(), self.roll.watched(self.note) if self.roll else nullcontext():
            dist.barrier(group=self.patient_group)

    def leave(self) -> None:
        """Leave the group while the others are still alive. Nothing may be called after this."""
        dist.destroy_process_group()
        # The group's threads end with the last reference to it. A thread that still frees a
        # tensor while Python shuts down aborts the whole process ("terminate called without an
        # active exception").
        self.patient_group = self.roll = None


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Raise ``ProcessError`` where a collective fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if memory_ran_out(error):  # here, and not elsewhere
            raise
        # torch has no error class for a lost peer: gloo raises RuntimeError, NCCL a subclass
        raise lost_process_error(error) from error


def lost_process_error(error: Exception) -> ProcessError:
    """Describe a failed collective as the loss of another process."""
    reason = " ".join(str(error).split())
    timed_out = "timed out" in reason.lower() or "timeout" in reason.lower()
    what = "did not answer within --process-timeout" if timed_out else "ended"
    return ProcessError(
        f"another process of this run {what} ({reason[:120]})",
        "see what that process printed, then continue from the last checkpoint with "
        "`clipft resume`",
    )
