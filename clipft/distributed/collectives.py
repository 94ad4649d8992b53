"""Several processes, one training run: the few things that they must do together.

Explicit collectives, not DistributedDataParallel: a step replays its micro-batches, so DDP's
hooks would reduce every gradient once per backward pass, and would divide by the processes a
loss that is already that of the whole batch. Here the embeddings are gathered once, the
gradients are added up once, and one process is the same face with nothing to do.

Each step collective starts with a note to all, over the CPU: a process that cannot go on with
the step says so there (``abandon_step``), and the others hear it instead of waiting.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipft.core.errors import ProcessError

T = TypeVar("T")

_BUCKET_BYTES = 64 << 20
"""Of gradients that travel in one message: bounds what a large model needs for it."""
_NOTE = 8
"""Numbers in a note: go on or not, dimensions, and a shape of at most six."""


class StepAbandonedError(Exception):
    """Another process cannot do this step as it is cut now: its memory does not hold it."""


class Processes(Protocol):
    """What the processes of a run do together: all call the same things in the same order.

    Raises (all but the silent ``OneProcess``):
        ProcessError: another one ended; or, where a timeout holds, was not heard of in time.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def local_world_size(self) -> int:
        """Of all, those that share this machine's memory, processors and disks."""

    def gather_rows(self, rows: Tensor) -> Tensor:
        """[n_i, ...] of each process -> [sum n_i, ...] on all, in the order of ranks. n_i may
        differ and be 0 (an empty tensor need not know the other dimensions); dtypes agree.
        Gradients do not flow through.

        Raises:
            StepAbandonedError: another process called ``abandon_step`` in place of this.
        """

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], complete: Collection[nn.Parameter] = ()
    ) -> None:
        """Add up gradients over the processes, in place, after all backward passes of a step.

        Those of ``complete`` (which may be among ``parameters``) are whole on each process
        already: the first one's is taken by all, so that rounding cannot drive them apart.
        A gradient that is None on all stays None.

        Raises:
            StepAbandonedError: another process called ``abandon_step`` in place of this.
        """

    def abandon_step(self) -> None:
        """In place of the next ``gather_rows`` or ``sum_gradients``: fails it on all others."""

    def any(self, flag: bool) -> bool:
        """Is it so on one of them?"""

    def gather_objects(self, value: T) -> list[T]:
        """The values of all, in the order of ranks; pickled."""

    def broadcast_object(self, value: T) -> T:
        """The first process's value, pickled; waits for it as long as that process lives."""

    def barrier(self) -> None:
        """Wait until all are here, as long as they live."""


@dataclass(frozen=True)
class OneProcess:
    """Alone: nothing to gather, nobody to wait for."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def gather_rows(self, rows: Tensor) -> Tensor:
        return rows.detach()

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], complete: Collection[nn.Parameter] = ()
    ) -> None:
        return

    def abandon_step(self) -> None:
        return

    def any(self, flag: bool) -> bool:
        return flag

    def gather_objects(self, value: T) -> list[T]:
        return [value]

    def broadcast_object(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        return


ALONE = OneProcess()


@dataclass
class ManyProcesses:
    """Over torch's default group, in which gloo moves CPU tensors and NCCL those of GPUs.

    ``patient`` is a gloo group that waits as long as the others live (a process that ends
    closes its sockets, which is noticed at once): for work that takes as long as it takes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    patient: Any

    def gather_rows(self, rows: Tensor) -> Tensor:
        rows = rows.detach()
        with telling_of_loss():
            shapes = self._exchange_notes(rows.shape)
            counts = [shape[0] for shape in shapes]
            if not any(counts):
                return rows
            row = next(shape[1:] for shape in shapes if shape[0])
            padded = rows.new_zeros(max(counts), *row)
            padded[: len(rows)] = rows.reshape(len(rows), *row)
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], complete: Collection[nn.Parameter] = ()
    ) -> None:
        whole = {id(parameter) for parameter in complete}
        summed = [parameter for parameter in parameters if id(parameter) not in whole]
        listed = [*summed, *complete]
        with telling_of_loss():
            self._exchange_notes(())
            present = torch.tensor([p.grad is not None for p in listed], dtype=torch.uint8)
            dist.all_reduce(present, dist.ReduceOp.MAX)
            for parameter, there in zip(listed, present.tolist(), strict=True):
                if there and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self.rank:
                for parameter in complete:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            for bucket in _buckets([p.grad for p in listed if p.grad is not None]):
                _add_up(bucket)

    def abandon_step(self) -> None:
        with telling_of_loss():
            self._exchange([1])

    def any(self, flag: bool) -> bool:
        with telling_of_loss():
            return any(note[0] for note in self._exchange([int(flag)]))

    def gather_objects(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with telling_of_loss():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        values: list[Any] = [value]
        with telling_of_loss():
            dist.broadcast_object_list(
                values, src=0, group=self.patient, device=torch.device("cpu")
            )
        return values[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        with telling_of_loss():
            dist.barrier(group=self.patient)

    def part(self) -> None:
        """Let go of the others, who still live: this is the last that is done.

        The group's threads end with the last reference to it. One that still gives back a
        tensor while Python ends would end the process: "terminate called without an active
        exception".
        """
        dist.destroy_process_group()
        self.patient = None

    def _exchange_notes(self, shape: Sequence[int]) -> list[list[int]]:
        """Go on with the step, a tensor of ``shape`` in hand; the shapes of all.

        Raises:
            StepAbandonedError: one of them does not.
        """
        notes = self._exchange([0, len(shape), *shape])
        if any(note[0] for note in notes):
            raise StepAbandonedError
        return [note[2 : 2 + note[1]] for note in notes]

    def _exchange(self, note: list[int]) -> list[list[int]]:
        ours = torch.tensor(note + [0] * (_NOTE - len(note)))
        theirs = [torch.empty_like(ours) for _ in range(self.world_size)]
        dist.all_gather(theirs, ours)
        return [other.tolist() for other in theirs]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, as many of one dtype as make a message."""
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


def _add_up(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def telling_of_loss() -> Iterator[None]:
    """torch has no kind for a lost peer: gloo raises RuntimeError, NCCL one of its children."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise lost_process(error) from error


def lost_process(error: Exception) -> ProcessError:
    reason = " ".join(str(error).split())
    late = "timed out" in reason.lower() or "timeout" in reason.lower()
    what = "was not heard of within --process-timeout" if late else "ended"
    return ProcessError(
        f"another process of this run {what} ({reason[:120]})",
        "see what that process said; go on from the last checkpoint with `clipft resume`",
    )
