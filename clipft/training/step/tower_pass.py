"""The forward and backward pass of a step through one tower.

Activation graphs of the forward pass are kept as far as memory allows. A chunk whose graph was not
kept runs forward again before its backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clipft.core.memory import MemoryBudget
from clipft.data.batch import Batch
from clipft.embedding.towers import Chunk, Tower


@dataclass
class GraphMemory:
    """Decides which chunks of a step keep their graphs.

    ``find_budget`` is called once, before the first step encodes anything. The memory of a chunk's
    graph is measured on the first chunk of each tower, in ``bytes_per_cell``.
    """

    find_budget: Callable[[], MemoryBudget]
    fewest: Callable[[int], int] = int
    """Maps the number of graphs that this process can keep to the number that it keeps. With
    sharded weights, all processes keep as many as the one with the least memory."""
    bytes_per_cell: dict[str, float] = field(default_factory=dict)
    _budget: MemoryBudget | None = None
    _held: float = 0
    _largest: float = 0
    """The size of the largest graph of a chunk in this step. Its backward pass runs while all kept
    graphs are in memory."""
    _spared: bool = False
    """Whether a step has kept more graphs than necessary."""

    def begin_step(self) -> None:
        if self._budget is None:
            self._budget = self.find_budget()
        self._held = self._largest = 0

    def halve(self) -> bool:
        """Keep half as much from now on, because memory has run out. Return False if that changes
        nothing: since the last call, only the graphs that are always kept were kept."""
        if self._budget is None or not self._spared:
            return False
        self._budget, self._spared = self._budget.halved(), False
        return True

    def kept(self, tower: Tower, chunks: Sequence[Chunk]) -> int:
        """Return how many of these chunks, from the first on, keep their graphs.

        A tower always keeps one, because a backward pass needs the memory for one graph anyway.
        """
        assert self._budget
        per_cell, count = self.bytes_per_cell[tower.name], 0
        self._largest = max(self._largest, per_cell * max(chunk.cells for chunk in chunks))
        room = self._budget.graphs(self._largest)
        for chunk in chunks:
            if count and self._held + per_cell * chunk.cells > room:
                break
            self._held += per_cell * chunk.cells
            count += 1
        self._spared |= count > 1
        return count


@dataclass
class TowerPass:
    """One tower's part of a step: ``embed`` and, once the loss is known, the backward passes.

    ``leaf`` [rows, D] holds the embeddings of all chunks, detached from their graphs, and collects
    the gradient of the loss.
    """

    tower: Tower
    graphs: GraphMemory
    step: int
    chunks: Sequence[Chunk] = ()
    leaf: Tensor = field(default_factory=lambda: torch.empty(0))
    _kept: list[Tensor | None] = field(default_factory=list)

    def embed(self, batches: Sequence[Batch]) -> Tensor:
        """Embed the pairs of all micro-batches, in order: float32 [pairs, D]."""
        made, device = self.tower.make_chunks(batches), self.tower.precision.device
        self.chunks = made.chunks
        for chunk in self.chunks[:2]:
            self.tower.transfer.start(chunk.inputs)
        rows = [self._encode_first(chunk) for chunk in self.chunks[:1]]
        keep = 0
        if rows and self.tower.trainable:
            keep = self.graphs.fewest(self.graphs.kept(self.tower, self.chunks))
        for i, chunk in enumerate(self.chunks[1:], start=1):
            for following in self.chunks[i + 1 : i + 2]:
                self.tower.transfer.start(following.inputs)
            with torch.set_grad_enabled(i < keep):
                rows.append(self.tower.encode(self.step, chunk))
        self._kept = list(rows[:keep])
        joined = torch.cat([r.detach() for r in rows]) if rows else torch.empty(0, device=device)
        self.leaf = joined.requires_grad_(self.tower.trainable)
        return self.leaf[made.order.to(device, non_blocking=True)]

    def _encode_first(self, chunk: Chunk) -> Tensor:
        """Encode the first chunk, whose graph is always kept, and measure it in the first step."""
        with torch.set_grad_enabled(self.tower.trainable), counting_saved() as saved:
            rows = self.tower.encode(self.step, chunk)
        self.graphs.bytes_per_cell.setdefault(self.tower.name, sum(saved.values()) / chunk.cells)
        return rows

    def backward_kept(self) -> None:
        """Backpropagate the gradient in ``leaf`` through the kept graphs, and free each at once."""
        for i, gradient in enumerate(self._gradients()[: len(self._kept)]):
            rows, self._kept[i] = self._kept[i], None
            assert rows is not None
            self.tower.use_masks(self.step, self.chunks[i])
            torch.autograd.backward(rows, gradient)

    def backward_rest(self) -> None:
        """Encode the other chunks again, and backpropagate the gradient through them."""
        rest = slice(len(self._kept), None)
        for chunk, gradient in zip(self.chunks[rest], self._gradients()[rest], strict=True):
            torch.autograd.backward(self.tower.encode(self.step, chunk), gradient)

    def _gradients(self) -> Sequence[Tensor]:
        """The gradient of the loss for the rows of each chunk."""
        gradient = self.leaf.grad
        if gradient is None:  # a process without pairs has no loss, but others wait for its passes
            gradient = torch.zeros_like(self.leaf)
        return torch.split(gradient, [chunk.rows for chunk in self.chunks])


def backward(*passes: TowerPass) -> None:
    """Run all backward passes of a step.

    The kept graphs of all towers are first, which frees the memory that the other chunks need.
    """
    trainable = [each for each in passes if each.tower.trainable]
    for each in trainable:
        each.backward_kept()
    for each in trainable:
        each.backward_rest()


@contextmanager
def counting_saved() -> Iterator[dict[int, int]]:
    """Count the bytes that autograd saves for the backward pass, by address of their storage.

    Parameters and their views are not counted, because they are in memory anyway.
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
