"""The loss over the effective batch, in the memory of a micro-batch.

The loss compares every image with every text of the batch, so averaging the losses of
micro-batches is another loss with fewer negatives. ``ExactAccumulation`` keeps it whole
(GradCache, Gao et al. 2021, arXiv:2101.06983): embed everything, take the loss and its
gradient with respect to the embeddings, then push each chunk's part of that gradient back
through its tower. A chunk whose graph had no room in memory goes forward once more for that.
The gradients are those of one large batch, on any number of processes: each embeds its own
pairs, all see all embeddings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from clipft.data.loader import EMPTY_BATCH, Batch
from clipft.data.positives import Positives
from clipft.distributed.collectives import Processes
from clipft.embedding.towers import Chunk, Tower, Towers
from clipft.models.trainable import TrainableModel
from clipft.training.step.losses import ContrastiveLoss
from clipft.training.step.weights import WHOLE, Weights


@dataclass(frozen=True)
class Embedded:
    """A chunk's embeddings: ``rows`` [rows, D] without a graph; ``graph`` with it, if kept."""

    rows: Tensor
    graph: Tensor | None


@dataclass
class ActivationBudget:
    """``budget``: how many bytes the graphs of a step may hold, asked when first needed.
    ``agreed``: whether it is so for all that must keep the same ones."""

    budget: Callable[[], int]
    agreed: Callable[[bool], bool] = bool
    _bytes_per_cell: dict[str, float] = field(default_factory=dict)
    _all: int | None = None
    _left: float = 0

    def begin_step(self) -> None:
        self._left = self._all or 0

    def release(self) -> None:
        """Keep none from now on: memory has run out."""
        self._all = 0

    def embed(self, tower: Tower, step: int, chunk: Chunk) -> Embedded:
        """Forward, with a graph where it is of use and there is room for it."""
        if tower.trainable and tower.name not in self._bytes_per_cell:
            return self._count(tower, step, chunk)
        keep = tower.trainable and self._takes(tower, chunk)
        with torch.set_grad_enabled(keep):
            rows = tower.encode(step, chunk)
        return Embedded(rows.detach(), rows if keep else None)

    def _takes(self, tower: Tower, chunk: Chunk) -> bool:
        needed = self._bytes_per_cell[tower.name] * chunk.cells
        fits = self.agreed(needed <= self._left)
        self._left -= needed if fits else 0
        return fits

    def _count(self, tower: Tower, step: int, chunk: Chunk) -> Embedded:
        with counting_saved() as saved:
            rows = tower.encode(step, chunk)
        self._bytes_per_cell[tower.name] = sum(saved.values()) / chunk.cells
        if self._all is None:
            self._all = self._left = self.budget()
        return Embedded(rows.detach(), rows if self._takes(tower, chunk) else None)


@contextmanager
def counting_saved() -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd saves in the block and no parameter holds anyway."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A parameter or a view of one is there in any case
        base = tensor._base if tensor._base is not None else tensor
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class Accumulation(Protocol):
    """Leaves the gradient of a step in the parameters; returns its loss, detached. Over many
    processes each has its own micro-batches, and all end with the same gradient and loss."""

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor: ...

    def floor(self, micro_batches: list[Batch]) -> float:
        """The least value that the loss of these could have: see ``ContrastiveLoss.floor``."""


@dataclass(frozen=True)
class Cutting:
    """What smaller micro-batches mean: ``least`` is the smallest that still trainable."""

    least: int
    consequence: str


@dataclass
class _Passed:
    """A tower after its first pass: ``leaf`` [rows, D] stands for the rows of its chunks."""

    tower: Tower
    step: int
    chunks: Sequence[Chunk]
    graphs: list[Tensor | None]
    leaf: Tensor
    order: Tensor

    def by_pair(self) -> Tensor:
        """[pairs, D], differentiable in ``leaf``."""
        return self.leaf[self.order]

    def backward(self) -> None:
        """From the gradient that the loss left in ``leaf`` to that of the parameters."""
        if not self.tower.trainable:
            return
        # No pair, no loss; but other processes may wait for these chunks
        given = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
        gradients = torch.split(given, [len(chunk.keys) for chunk in self.chunks])
        for i, (chunk, gradient) in enumerate(zip(self.chunks, gradients, strict=True)):
            graph, self.graphs[i] = self.graphs[i], None
            rows = self.tower.encode(self.step, chunk) if graph is None else graph
            self.tower.backward(self.step, chunk, rows, gradient)


@dataclass(frozen=True)
class _Accumulation:
    model: TrainableModel
    towers: Towers
    loss: ContrastiveLoss
    positives: Positives
    processes: Processes
    scaler: "torch.amp.GradScaler"
    graphs: ActivationBudget
    weights: Weights = WHOLE

    def _pass(self, tower: Tower, step: int, batches: Sequence[Batch]) -> _Passed:
        cut = tower.cut(batches)
        embedded = [self.graphs.embed(tower, step, chunk) for chunk in cut.chunks]
        rows = torch.cat([e.rows for e in embedded]) if embedded else torch.empty(0)
        leaf = rows.to(self.towers.images.precision.device).requires_grad_(tower.trainable)
        return _Passed(tower, step, cut.chunks, [e.graph for e in embedded], leaf, cut.order)

    def _own_groups(self, batches: Sequence[Batch]) -> Tensor | None:
        ids = [self.positives.ids(batch) for batch in batches or [EMPTY_BATCH]]
        known = [i.to(self.towers.images.precision.device) for i in ids if i is not None]
        return torch.cat(known) if known else None

    def _sum_gradients(self, complete: Sequence[nn.Parameter] = ()) -> None:
        self.weights.sum_gradients(self.model, self.processes, complete)


@dataclass(frozen=True)
class ExactAccumulation(_Accumulation):
    """The loss of the whole effective batch."""

    cutting: ClassVar[Cutting] = Cutting(1, "the effective batch and the loss stay as they were")

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        device = self.towers.images.precision.device
        batches = [batch.to(device) for batch in micro_batches]
        self.graphs.begin_step()
        images = self._pass(self.towers.images, step, batches)
        texts = self._pass(self.towers.texts, step, batches)
        loss = self.loss(
            self._among_all(images.by_pair()),
            self._among_all(texts.by_pair()),
            self._groups(batches),
        )
        if loss.requires_grad:
            torch.autograd.backward(self.scaler.scale(loss))
        images.backward()
        texts.backward()
        self._sum_gradients(self._scalars)
        return loss.detach()

    @property
    def _scalars(self) -> list[nn.Parameter]:
        """Their gradients come from the loss of all pairs itself: every process has them whole."""
        return [p for _, p in self.model.trainable() if p.ndim == 0 or p.shape == (1,)]

    def floor(self, micro_batches: list[Batch]) -> float:
        return self.loss.floor(self._groups(micro_batches))

    def _among_all(self, own: Tensor) -> Tensor:
        """The rows of all processes, [N, D]: this one's with their gradient."""
        counts = self.processes.gather_rows(torch.tensor([len(own)])).tolist()
        rows = self.processes.gather_rows(own)
        first = sum(counts[: self.processes.rank])
        return torch.cat([rows[:first], own, rows[first + len(own) :]]) if len(own) else rows

    def _groups(self, batches: Sequence[Batch]) -> Tensor | None:
        own = self._own_groups(batches)
        return None if own is None else self.processes.gather_rows(own)


@dataclass(frozen=True)
class LocalAccumulation(_Accumulation):
    """The mean of the micro-batches' own losses: fewer negatives."""

    # A pair alone has no negatives: its loss is 0 whatever the model
    cutting: ClassVar[Cutting] = Cutting(2, "each has fewer negatives, which is another loss")

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        device = self.towers.images.precision.device
        own = torch.tensor([sum(len(batch) for batch in micro_batches)])
        total = int(self.processes.gather_rows(own).sum())
        mean = torch.zeros(1, device=device)
        for micro_batch in self.towers.even_out(micro_batches):
            batches = [micro_batch.to(device)] if len(micro_batch) else []
            self.graphs.begin_step()
            images = self._pass(self.towers.images, step, batches)
            texts = self._pass(self.towers.texts, step, batches)
            if batches:
                groups = self._own_groups(batches)
                share = self.loss(images.by_pair(), texts.by_pair(), groups) * (
                    len(micro_batch) / total
                )
                if share.requires_grad:
                    torch.autograd.backward(self.scaler.scale(share))
                mean += share.detach()
            images.backward()
            texts.backward()
        self._sum_gradients()
        return self.processes.gather_rows(mean).sum()

    def floor(self, micro_batches: list[Batch]) -> float:
        groups = [self._own_groups([batch]) for batch in micro_batches]
        floors = [self.loss.floor(ids) * len(ids) for ids in groups if ids is not None]
        pairs = sum(len(batch) for batch in micro_batches)
        own = torch.tensor([[sum(floors), pairs]], dtype=torch.float64)
        summed, all_pairs = self.processes.gather_rows(own).sum(0)
        return float(summed / all_pairs)


ACCUMULATIONS: dict[str, type[ExactAccumulation] | type[LocalAccumulation]] = {
    "exact": ExactAccumulation,
    "local": LocalAccumulation,
}
