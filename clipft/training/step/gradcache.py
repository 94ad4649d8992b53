"""The loss over the effective batch, in the memory of a micro-batch.

The loss compares every image with every text of the batch, so averaging the losses of
micro-batches is another loss, with fewer negatives. ``ExactAccumulation`` computes it whole
(GradCache, Gao et al. 2021, arXiv:2101.06983):

1. embed all pairs, chunk by chunk;
2. take the loss over all embeddings, and its gradient with respect to them;
3. push each chunk's part of that gradient back through its tower. A chunk whose graph did not fit
   in memory runs forward once more for this.

The gradients are those of one large batch, on any number of processes: each process embeds its
own pairs, and all see all embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clipft.data.loader import Batch
from clipft.data.positives import Positives
from clipft.distributed.step_channel import ALONE, StepChannel
from clipft.embedding.towers import Chunk, Tower, Towers
from clipft.models.trainable import TrainableModel
from clipft.training.step.losses import ContrastiveLoss
from clipft.training.step.oom import Recovery
from clipft.training.step.weights import WHOLE_WEIGHTS, Weights


@dataclass
class Accumulation(ABC):
    """Computes the loss of a step and leaves its gradient in the parameters.

    With many processes each is given its own micro-batches, and all end with the same gradient
    and loss. ``lower_bound`` is the smallest loss that any model could have had on the pairs of
    the last step.
    """

    smallest_micro_batch: ClassVar[int]
    if_smaller: ClassVar[str]
    """What smaller micro-batches mean for the loss, as the end of a warning."""

    model: TrainableModel
    towers: Towers
    loss: ContrastiveLoss
    positives: Positives
    scaler: "torch.amp.GradScaler"
    graphs: "ActivationBudget"
    channel: StepChannel = ALONE
    weights: Weights = WHOLE_WEIGHTS
    recovery: Recovery = field(default_factory=Recovery)
    lower_bound: float = field(default=0.0, init=False)

    @abstractmethod
    def __call__(self, step: int, micro_batches: list[Batch], pairs: int | None = None) -> Tensor:
        """Add the gradient of ``step`` (from 0) to the parameters; return its detached loss.

        ``pairs`` is how many there are on all processes; those of ``micro_batches`` by default.
        """

    def _embed(self, tower: Tower, step: int, batches: Sequence[Batch]) -> "_TowerPass":
        cut = tower.make_chunks(batches)
        embedded = [self.graphs.embed(tower, step, chunk) for chunk in cut.chunks]
        rows = torch.cat([rows for rows, _ in embedded]) if embedded else torch.empty(0)
        leaf = rows.to(self.towers.images.precision.device).requires_grad_(tower.trainable)
        graphs = [graph for _, graph in embedded]
        return _TowerPass(tower, step, cut.chunks, graphs, leaf, leaf[cut.order])

    def _groups(self, batches: Sequence[Batch]) -> Tensor | None:
        """Group ids of this process's pairs, int64 [pairs]; None if each pair is its own group."""
        known = [i for i in map(self.positives.ids, batches) if i is not None]
        return torch.cat(known) if known else None


class ExactAccumulation(Accumulation):
    """The loss over the whole effective batch."""

    smallest_micro_batch = 1
    if_smaller = "the effective batch and the loss stay as they were"

    def __call__(self, step: int, micro_batches: list[Batch], pairs: int | None = None) -> Tensor:
        device = self.towers.images.precision.device
        micro_batches = self.recovery.split(micro_batches)
        batches = [batch.to(device) for batch in micro_batches]
        self.graphs.begin_step()
        images = self._embed(self.towers.images, step, batches)
        texts = self._embed(self.towers.texts, step, batches)
        groups = self._groups(micro_batches)
        everyone = self.channel.exchange(images.by_pair, texts.by_pair, groups)
        loss = self.loss(*everyone)
        self.lower_bound = self.loss.lower_bound(everyone.groups)
        if loss.requires_grad:  # not if both towers are frozen
            torch.autograd.backward(self.scaler.scale(loss))
        images.backward()
        texts.backward()
        # Every process takes the loss of all pairs, so the gradients of temperature and bias,
        # which the loss reads directly, are already complete everywhere
        scalars = [p for _, p in self.model.trainable() if p.ndim == 0 or p.shape == (1,)]
        self.weights.sum_gradients(self.model, self.channel, scalars)
        return loss.detach()


class LocalAccumulation(Accumulation):
    """The mean of the micro-batches' own losses, which have fewer negatives."""

    smallest_micro_batch = 2  # a single pair has no negatives: its loss is 0 whatever the model
    if_smaller = "each has fewer negatives, which changes the loss"

    def __call__(self, step: int, micro_batches: list[Batch], pairs: int | None = None) -> Tensor:
        device = self.towers.images.precision.device
        micro_batches = self.recovery.split(micro_batches)
        pairs = pairs or sum(map(len, micro_batches))
        mean, lower_bound = torch.zeros((), device=device), 0.0
        for micro_batch in self.towers.even_out(micro_batches):
            batches = [micro_batch.to(device)] if len(micro_batch) else []
            self.graphs.begin_step()
            images = self._embed(self.towers.images, step, batches)
            texts = self._embed(self.towers.texts, step, batches)
            if batches:
                groups, weight = self._groups([micro_batch]), len(micro_batch) / pairs
                share = self.loss(images.by_pair, texts.by_pair, groups) * weight
                lower_bound += self.loss.lower_bound(groups) * weight
                if share.requires_grad:
                    torch.autograd.backward(self.scaler.scale(share))
                mean += share.detach()
            images.backward()
            texts.backward()
        figures = (float(mean), lower_bound)
        loss, self.lower_bound = self.weights.sum_gradients(
            self.model, self.channel, figures=figures
        )
        return torch.tensor(loss)


ACCUMULATIONS: dict[str, type[ExactAccumulation] | type[LocalAccumulation]] = {
    "exact": ExactAccumulation,
    "local": LocalAccumulation,
}


@dataclass
class _TowerPass:
    """One tower after the first forward pass of a step.

    ``leaf`` [rows, D] holds the embeddings of all chunks, cut off from the graphs that made them,
    and collects the gradient of the loss. ``by_pair`` [pairs, D] is taken from it, in the order of
    the pairs. ``graphs`` has the rows of each chunk with their graph, or None if it was not kept.
    """

    tower: Tower
    step: int
    chunks: Sequence[Chunk]
    graphs: list[Tensor | None]
    leaf: Tensor
    by_pair: Tensor

    def backward(self) -> None:
        """Carry the gradient that the loss left in ``leaf`` back to the tower's parameters."""
        if not self.tower.trainable:
            return
        # A process without pairs has no loss, but others may wait for it in these chunks
        given = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
        gradients = torch.split(given, [len(chunk.keys) for chunk in self.chunks])
        for i, (chunk, gradient) in enumerate(zip(self.chunks, gradients, strict=True)):
            graph, self.graphs[i] = self.graphs[i], None  # freed as soon as it was used
            rows = self.tower.encode(self.step, chunk) if graph is None else graph
            self.tower.backward(self.step, chunk, rows, gradient)


@dataclass
class ActivationBudget:
    """Keeps the graphs of as many chunks as there is memory for.

    ``find_bytes`` tells how many bytes the graphs of a step may hold; it is called once, in the
    first step. ``all_agree`` is for processes that must keep the same graphs. How much the graph
    of a chunk takes is measured on the first chunk of each tower, in ``bytes_per_cell``.
    """

    find_bytes: Callable[[], int]
    all_agree: Callable[[bool], bool] = bool
    bytes_per_cell: dict[str, float] = field(default_factory=dict)
    _bytes: int | None = None
    _left: float = 0

    def begin_step(self) -> None:
        self._left = self._bytes or 0

    def release(self) -> None:
        """Keep no graphs from now on, because memory has run out."""
        self._bytes = 0

    def embed(self, tower: Tower, step: int, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Encode a chunk: its rows [rows, D] without a graph, and with one if it is kept."""
        rows = None
        if tower.trainable and tower.name not in self.bytes_per_cell:
            with counting_saved() as saved:
                rows = tower.encode(step, chunk)
            self.bytes_per_cell[tower.name] = sum(saved.values()) / chunk.cells
            if self._bytes is None:
                self._bytes = self._left = self.find_bytes()
        keep = False
        if tower.trainable:
            needed = self.bytes_per_cell[tower.name] * chunk.cells
            keep = self.all_agree(needed <= self._left)
            self._left -= needed if keep else 0
        if rows is None:
            with torch.set_grad_enabled(keep):
                rows = tower.encode(step, chunk)
        return rows.detach(), rows if keep else None


@contextmanager
def counting_saved() -> Iterator[dict[int, int]]:
    """Count the bytes that autograd saves for the backward pass, by address of their storage.

    Parameters and views of them are not counted: they are in memory anyway.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
