"""Which graphs of a step are kept for the backward pass, and which are computed twice.

A piece whose graph is kept needs no second forward pass. How much a graph holds is counted
once, on the first piece of each side, by what autograd saves; as many are kept as fit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clipft.embedding.towers import Piece, Side


@dataclass(frozen=True)
class Embedded:
    """A piece's embeddings: ``rows`` [rows, D] without a graph; ``graph`` with it, if kept."""

    rows: Tensor
    graph: Tensor | None


@dataclass
class GraphMemory:
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

    def embed(self, side: Side, step: int, piece: Piece) -> Embedded:
        """Forward, with a graph where it is of use and there is room for it."""
        if side.learns and side.name not in self._bytes_per_cell:
            return self._count(side, step, piece)
        keep = side.learns and self._takes(side, piece)
        with torch.set_grad_enabled(keep):
            rows = side.encode(step, piece)
        return Embedded(rows.detach(), rows if keep else None)

    def _takes(self, side: Side, piece: Piece) -> bool:
        needed = self._bytes_per_cell[side.name] * piece.cells
        fits = self.agreed(needed <= self._left)
        self._left -= needed if fits else 0
        return fits

    def _count(self, side: Side, step: int, piece: Piece) -> Embedded:
        with counting_saved() as saved:
            rows = side.encode(step, piece)
        self._bytes_per_cell[side.name] = sum(saved.values()) / piece.cells
        if self._all is None:
            self._all = self._left = self.budget()
        return Embedded(rows.detach(), rows if self._takes(side, piece) else None)


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
