"""What the processes of one run do together, as explicit collectives.

DistributedDataParallel does not fit here. A step sends its micro-batches through the towers
twice, so DDP's hooks would reduce every gradient once per backward pass; and it divides by the
number of processes, although the loss is already the loss of the whole batch. Instead, the
embeddings are gathered once and the gradients are added up once per step.

``Processes`` is a run of one process, in which every collective is trivial.
``DistributedProcesses`` does the same over torch.distributed.

Each collective of a training step first exchanges a short header between the CPUs. A process
that cannot finish the step announces it there (``abandon_step``), so that the others get a
``StepAbandonedError`` instead of waiting for it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipft.core.errors import ProcessError

T = TypeVar("T")

_BUCKET_BYTES = 64 << 20
"""Bytes of gradients in one message. It bounds the extra memory that a large model needs."""
_HEADER_LENGTH = 8
"""Integers in a header: whether the step is abandoned, the number of dimensions, and a shape of
at most six."""


class StepAbandonedError(Exception):
    """Another process ran out of memory in this step and needs smaller chunks."""


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

        Raises:
            StepAbandonedError: another process called ``abandon_step`` instead.
        """
        return rows.detach()

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], complete: Collection[nn.Parameter] = ()
    ) -> None:
        """Add up the gradients of all processes in place, after a step's backward passes.

        A gradient that is None on every process stays None.

        Args:
            parameters: each process holds a part of their gradients.
            complete: every process already holds their whole gradient (they may also be among
                ``parameters``). All take rank zero's, so that rounding cannot drive the
                processes apart.

        Raises:
            StepAbandonedError: another process called ``abandon_step`` instead.
        """

    def abandon_step(self) -> None:
        """Call this instead of ``gather_rows`` or ``sum_gradients``: both then fail elsewhere."""

    def any(self, flag: bool) -> bool:
        """Return True if ``flag`` is true on at least one process."""
        return flag

    def gather_objects(self, value: T) -> list[T]:
        """Return the (pickled) values of all processes in the order of their ranks."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Return rank zero's (pickled) value, however long rank zero takes to get here."""
        return value

    def barrier(self) -> None:
        """Wait until all processes are here, however long they take."""


ALONE = Processes()
"""A run of one process."""


@dataclass(eq=False)
class DistributedProcesses(Processes):
    """Processes that talk over torch's default group: gloo for CPU tensors, NCCL for CUDA's.

    ``patient_group`` is a gloo group without a timeout, for work that takes as long as it takes.
    A process that ends closes its sockets, which the others notice at once.
    """

    patient_group: Any = None

    def gather_rows(self, rows: Tensor) -> Tensor:
        rows = rows.detach()
        with lost_process_errors():
            shapes = self._exchange_shapes(rows.shape)
            counts = [shape[0] for shape in shapes]
            if not any(counts):
                return rows
            row_shape = next(shape[1:] for shape in shapes if shape[0])
            # all_gather wants equal shapes: pad to the longest, and cut the padding off below
            padded = rows.new_zeros(max(counts), *row_shape)
            padded[: len(rows)] = rows.reshape(len(rows), *row_shape)
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], complete: Collection[nn.Parameter] = ()
    ) -> None:
        complete_ids = {id(parameter) for parameter in complete}
        partial = [parameter for parameter in parameters if id(parameter) not in complete_ids]
        listed = [*partial, *complete]
        with lost_process_errors():
            self._exchange_shapes(())
            # A process whose share of the step was empty has no gradients: it adds zeros
            present = torch.tensor([p.grad is not None for p in listed], dtype=torch.uint8)
            dist.all_reduce(present, dist.ReduceOp.MAX)
            for parameter, anywhere in zip(listed, present.tolist(), strict=True):
                if anywhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self.rank:  # so that the sum is rank zero's gradient
                for parameter in complete:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            for bucket in _buckets([p.grad for p in listed if p.grad is not None]):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                parts = torch.split(flat, [gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def abandon_step(self) -> None:
        with lost_process_errors():
            self._exchange([1])

    def any(self, flag: bool) -> bool:
        with lost_process_errors():
            return any(header[0] for header in self._exchange([int(flag)]))

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
        with lost_process_errors():
            dist.barrier(group=self.patient_group)

    def leave(self) -> None:
        """Leave the group while the others are still alive. Nothing may be called after this."""
        dist.destroy_process_group()
        # The group's threads end with the last reference to it. A thread that still frees a
        # tensor while Python shuts down aborts the whole process ("terminate called without an
        # active exception").
        self.patient_group = None

    def _exchange_shapes(self, shape: Sequence[int]) -> list[list[int]]:
        """Tell the others that the step continues, and return the shape that each one brings.

        Raises:
            StepAbandonedError: a process abandoned the step.
        """
        headers = self._exchange([0, len(shape), *shape])
        if any(header[0] for header in headers):
            raise StepAbandonedError
        return [header[2 : 2 + header[1]] for header in headers]

    def _exchange(self, header: list[int]) -> list[list[int]]:
        ours = torch.tensor(header + [0] * (_HEADER_LENGTH - len(header)))
        theirs = [torch.empty_like(ours) for _ in range(self.world_size)]
        dist.all_gather(theirs, ours)
        return [other.tolist() for other in theirs]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group gradients, in their order, into messages of one dtype and bounded size."""
    bucket, held = list[Tensor](), 0
    for gradient in gradients:
        full = held + gradient.nbytes > _BUCKET_BYTES
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.nbytes
    if bucket:
        yield bucket


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Raise ``ProcessError`` where a collective fails because another process is gone."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but our own
        raise
    except RuntimeError as error:
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
