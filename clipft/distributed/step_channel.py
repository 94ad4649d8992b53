"""The communication between the processes of a run during a training step.

``exchange`` gives every process the embeddings of all processes, and ``sum`` adds up the gradients.
Each of the two has four parts:

1. agree: a header of fixed length over the CPUs (gloo). It says what each process brings, and
   whether it has run out of memory since the last agreement;
2. allocate every buffer that the rest needs, which may run out of memory;
3. agree: the others learn whether that went well everywhere;
4. move: the collectives between the devices (NCCL), which allocate nothing.

So a process that runs out of memory (in a tower, in the loss, in a buffer) announces it in the
next agreement, which all others have to pass before their devices wait for it. They get a
``StepAbandonedError`` there, and all can repeat the step together. A process that waits within
NCCL could not hear of it.

DistributedDataParallel does not fit here. A step sends its micro-batches through the towers
twice, so DDP's hooks would reduce every gradient once per backward pass; and it divides by the
number of processes, although the loss is already the loss of the whole batch.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipft.core.out_of_memory import no_second_attempt
from clipft.distributed.collectives import Processes, lost_process_errors

_BUCKET_BYTES = 64 << 20
"""Bytes of gradients in one message. It bounds the extra memory that a large model needs."""
_GOES_ON, _RAN_OUT = 0, 1
"""The first number of a header."""
_FIGURES = 4
"""Numbers in a header whose meaning depends on the agreement."""
_BITS = 60
"""Flags that are packed into one number of a header, an int64."""


class StepAbandonedError(Exception):
    """Another process ran out of memory in this step and needs smaller chunks."""


class Rows(NamedTuple):
    """The rows of a step: unit embeddings float32 [N, D] and, if there are groups or products,
    their ids, int64 [N]."""

    images: Tensor
    texts: Tensor
    groups: Tensor | None
    products: Tensor | None = None


class StepChannel:
    """How the processes of a run communicate during a step.

    This base class is for a run of a single process and sends nothing.

    All processes call ``exchange`` and ``sum`` in the same order. A process that cannot go on
    because it is out of memory calls ``abandon`` instead of the next one, or after one has failed.
    """

    def exchange(
        self,
        images: Tensor,
        texts: Tensor,
        groups: Tensor | None = None,
        products: Tensor | None = None,
    ) -> Rows:
        """Collect the rows of all processes, in the order of their ranks.

        Args:
            images: float32 [n_i, D] on the device. ``n_i`` may differ and may be 0; an empty
                tensor does not need to have the other dimension right.
            texts: the same for the texts of the same pairs.
            groups: int64 [n_i] on the CPU, or None if each pair is a group of its own; on all
                processes alike, except that one without pairs may give None.
            products: the same for the products that the images show.

        Returns:
            The rows of all. Gradients flow to this process's own rows only.

        Raises:
            StepAbandonedError: another process has run out of memory.
            ProcessError: another process ended or did not answer in time.
            MemoryShortage: NCCL itself ran out of memory, where the others wait for it.
        """
        return Rows(images, texts, groups, products)

    def sum(
        self,
        parameters: Iterable[nn.Parameter],
        complete: Collection[nn.Parameter] = (),
        figures: Sequence[float] = (),
    ) -> list[float]:
        """Add up the gradients of all processes in place, after a step's backward passes.

        A gradient that is None on every process stays None.

        Args:
            parameters: each process holds a part of their gradients.
            complete: every process already holds their whole gradient (they may also be among
                ``parameters``). All take rank zero's, so that rounding cannot drive the
                processes apart.
            figures: at most four, also to be added up.

        Returns:
            The sums of ``figures``.

        Raises:
            StepAbandonedError, ProcessError, MemoryShortage: see ``exchange``.
        """
        return list(figures)

    def abandon(self) -> None:
        """Tell the others in the next agreement that this process cannot finish the step."""


ALONE = StepChannel()
"""The channel of a run of one process."""


def open_channel(processes: Processes, parameters: int) -> StepChannel:
    """Open the channel between ``processes``; ``parameters`` is the most that ``sum`` adds up."""
    if processes.world_size == 1:
        return ALONE
    return DistributedStepChannel(processes, parameters)


@dataclass
class DistributedStepChannel(StepChannel):
    """A channel over torch's default group: gloo for CPU tensors, NCCL for CUDA's.

    ``devices`` is the group that moves rows and gradients, if it is not the default group.
    """

    processes: Processes
    parameters: int
    devices: Any = None

    def __post_init__(self) -> None:
        # Every header has the length of the longest one, because a process that abandons the step
        # does not know which header the others are about to send
        self._header_length = 1 + _FIGURES + len(_packed([False] * self.parameters))
        self._next_length = self._header_length

    def exchange(
        self,
        images: Tensor,
        texts: Tensor,
        groups: Tensor | None = None,
        products: Tensor | None = None,
    ) -> Rows:
        own = len(images)
        width = images.shape[1] if own else 0
        headers = self._agree([own, width, *(int(ids is not None) for ids in (groups, products))])
        counts = [header[0] for header in headers]
        grouped, with_products = (any(header[at] for header in headers) for at in (2, 3))
        most = max(counts)

        # All processes send equally many rows: the longest part is the measure
        self._next_length = 1 + most * (grouped + with_products)
        width = max(header[1] for header in headers)
        sent = images.new_zeros(most, 2 * width)
        received = images.new_empty(len(counts) * most, 2 * width)

        known = [i for ids in (groups, products) if ids is not None for i in ids.tolist()]
        told = self._agree(known)  # on the CPU anyway, and int64, so they pass with the agreement
        self._next_length = self._header_length

        with torch.no_grad(), _moving():
            if own:
                sent[:own, :width].copy_(images)
                sent[:own, width:].copy_(texts)
            dist.all_gather_into_tensor(received, sent, group=self.devices)
        parts = received.view(len(counts), most, 2 * width)

        def ids_of_all(nth: int) -> Tensor:
            parts = zip(counts, told, strict=True)
            ids = [i for count, part in parts for i in part[nth * count : (nth + 1) * count]]
            return torch.tensor(ids, dtype=torch.int64)

        return Rows(
            self._with_own(images, [p[:n, :width] for p, n in zip(parts, counts, strict=True)]),
            self._with_own(texts, [p[:n, width:] for p, n in zip(parts, counts, strict=True)]),
            ids_of_all(0) if grouped else None,
            ids_of_all(int(grouped)) if with_products else None,
        )

    def sum(
        self,
        parameters: Iterable[nn.Parameter],
        complete: Collection[nn.Parameter] = (),
        figures: Sequence[float] = (),
    ) -> list[float]:
        complete_ids = {id(parameter) for parameter in complete}
        partial = [parameter for parameter in parameters if id(parameter) not in complete_ids]
        listed = [*partial, *complete]
        as_integers = torch.tensor([*figures], dtype=torch.float64).view(torch.int64).tolist()
        unused = [0] * (_FIGURES - len(as_integers))
        present = _packed([p.grad is not None for p in listed])
        headers = self._agree([*as_integers, *unused, *present])

        # A process whose share of the step was empty has no gradients: it adds zeros
        anywhere = _unpacked([header[_FIGURES:] for header in headers], len(listed))
        for parameter, there in zip(listed, anywhere, strict=True):
            if there and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        buckets = list(_buckets([p.grad for p in listed if p.grad is not None]))
        flat = _flat_buffers(buckets)

        self._agree([])
        if self.processes.rank:  # so that the sum is rank zero's gradient
            for parameter in complete:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        with torch.no_grad(), _moving():
            for bucket in buckets:
                sizes = [gradient.numel() for gradient in bucket]
                message = flat[bucket[0].dtype][: sum(sizes)]
                parts = [
                    p.view_as(g) for p, g in zip(torch.split(message, sizes), bucket, strict=True)
                ]
                torch._foreach_copy_(parts, bucket)
                dist.all_reduce(message, group=self.devices)
                torch._foreach_copy_(bucket, parts)
        told = torch.tensor([header[:_FIGURES] for header in headers]).view(torch.float64)
        sums: list[float] = told.sum(0)[: len(figures)].tolist()
        return sums

    def abandon(self) -> None:
        length, self._next_length = self._next_length, self._header_length
        self._tell(_RAN_OUT, [], length)

    def _agree(self, numbers: list[int]) -> list[list[int]]:
        """Tell the others that this process goes on, and return the numbers of all.

        Raises:
            StepAbandonedError: a process has run out of memory.
        """
        told = self._tell(_GOES_ON, numbers, self._next_length)
        if any(header[0] == _RAN_OUT for header in told):
            self._next_length = self._header_length
            raise StepAbandonedError
        return [header[1:] for header in told]

    def _tell(self, status: int, numbers: list[int], length: int) -> list[list[int]]:
        unused = [0] * (length - 1 - len(numbers))
        return self.processes.gather_integers([status, *numbers, *unused])

    def _with_own(self, own: Tensor, parts: list[Tensor]) -> Tensor:
        """Join the parts of all processes. ``own`` replaces what came back of this process's rows,
        because gradients flow through it."""
        if len(own):
            parts[self.processes.rank] = own
        return torch.cat(parts)


def _packed(flags: list[bool]) -> list[int]:
    """The flags as bits of numbers."""
    parts = [flags[i : i + _BITS] for i in range(0, len(flags), _BITS)]
    return [sum(flag << i for i, flag in enumerate(part)) for part in parts]


def _unpacked(packed: list[list[int]], count: int) -> list[bool]:
    """Which of ``count`` flags are set in at least one of several ``_packed`` lists."""
    return [any(words[i // _BITS] >> i % _BITS & 1 for words in packed) for i in range(count)]


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


def _flat_buffers(buckets: list[list[Tensor]]) -> dict[torch.dtype, Tensor]:
    """Return a buffer for each dtype, as long as its longest message; messages are sent in turn."""
    longest: dict[torch.dtype, tuple[int, Tensor]] = {}
    for bucket in buckets:
        first, length = bucket[0], sum(gradient.numel() for gradient in bucket)
        if length >= longest.get(first.dtype, (0, first))[0]:
            longest[first.dtype] = length, first
    return {dtype: first.new_empty(length) for dtype, (length, first) in longest.items()}


@contextmanager
def _moving() -> Iterator[None]:
    """Translate the errors of a block in which the devices wait for each other.

    Raises:
        MemoryShortage: this process alone ran out of memory.
        ProcessError: another process ended.
    """
    where = " in the exchange between the GPUs, where the other processes wait for this one"
    hint = "run `clipft resume` to continue from the last checkpoint, with a smaller "
    hint += "--micro-batch-size or --graph-memory"
    with no_second_attempt(where, hint), lost_process_errors():
        yield
