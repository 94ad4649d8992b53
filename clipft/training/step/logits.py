"""The losses as functions of all logits, computed at once or in blocks of rows.

``clip``    softmax over all texts of the batch and over all images (Radford et al. 2021).
``siglip``  each image with each text on its own, with a bias (Zhai et al. 2023).

A loss is a function of all logits, minus the logits of the positives. The positives are subtracted
row by row, because rounding could make the difference of two large sums negative.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus


@dataclass
class Targets:
    """Which pairs are positives, negatives or neither.

    Without ``groups`` (int64 [N]), image i has text i as its only positive. With ``weights`` [N],
    all texts of its group are positives, each with the weight of its row. With ``groups`` only, the
    other texts of its group are neither. Both methods return [rows, N], from row ``first`` on.
    """

    groups: Tensor | None = None
    weights: Tensor | None = None

    def mask(self, first: int, rows: int) -> Tensor | None:
        """Return True where a pair is neither positive nor negative; None if there are none."""
        if self.groups is None or self.weights is not None:
            return None
        others = self.groups[first : first + rows, None] == self.groups
        others.diagonal(first).fill_(False)
        return others

    def weight(self, first: int, rows: int, out: Tensor | None = None) -> Tensor | None:
        """Return the weights of the positives; None if each row has one, with a weight of 1."""
        if self.groups is None or self.weights is None:
            return None
        own = slice(first, first + rows)
        return torch.mul(self.groups[own, None] == self.groups, self.weights[own, None], out=out)


def _positive_logits(
    logits: Tensor, weight: Tensor | None, first: int = 0, scratch: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of the logits of each row's positives, [rows]."""
    if weight is None:
        return logits.diagonal(first)
    return torch.mul(logits, weight, out=scratch).sum(1)


Computed = tuple[Tensor, tuple[Tensor, ...] | None]
"""The loss summed over the rows, and, if requested, its gradients for images and texts."""


def whole_loss(
    kind: "Loss", targets: Targets, images: Tensor, texts: Tensor, differentiate: bool
) -> Computed:
    """Compute the loss from the whole matrix of logits, and its gradients by autograd."""
    mask, weight = targets.mask(0, len(images)), targets.weight(0, len(images))
    with torch.set_grad_enabled(differentiate):
        leaves = [x.detach().requires_grad_(differentiate) for x in (images, texts)]
        logits = leaves[0] @ leaves[1].T
        compared = logits if mask is None else logits.masked_fill(mask, -math.inf)
        total = (kind.whole(compared) - _positive_logits(logits, weight)).sum()
        # Here and not in the backward pass of the step, so that it is in full precision too
        gradients = torch.autograd.grad(total, leaves) if differentiate else None
    return total.detach(), gradients


class Block(NamedTuple):
    """Some rows of the masked logits, [rows, N] each. The first two may be overwritten."""

    logits: Tensor
    scratch: Tensor
    weight: Tensor | None
    rows: slice


Blocks = Callable[[], Iterator[Block]]
"""Yields the blocks one after the other, in the same memory; may be called several times."""

Add = Callable[[Block, Tensor], None]
"""Uses, and overwrites, the gradient of a block's logits."""


def streamed_loss(
    kind: "Loss", targets: Targets, size: int, images: Tensor, texts: Tensor, differentiate: bool
) -> Computed:
    """Compute the same as ``whole_loss`` from blocks of ``size`` rows, in memory allocated once.

    Allocating memory for each block would fragment the heap of a CPU to many times its size.
    """
    n = len(images)
    logits, scratch, weights = images.new_empty(3, size, n)
    positive_logits = images.new_empty(n)
    gradients = (torch.empty_like(images), torch.zeros_like(texts)) if differentiate else None

    def blocks() -> Iterator[Block]:
        for first in range(0, n, size):
            rows, count = slice(first, first + size), min(size, n - first)
            block = torch.mm(images[rows], texts.T, out=logits[:count])
            if (mask := targets.mask(first, count)) is not None:
                block.masked_fill_(mask, -math.inf)
            weight = targets.weight(first, count, out=weights[:count])
            positive_logits[rows] = _positive_logits(block, weight, first, scratch[:count])
            yield Block(block, scratch[:count], weight, rows)

    def add(block: Block, gradient: Tensor) -> None:
        assert gradients is not None
        if block.weight is None:
            gradient.diagonal(block.rows.start).sub_(1)
        else:
            gradient -= block.weight
        torch.mm(gradient, texts, out=gradients[0][block.rows])
        gradients[1].addmm_(gradient.T, images[block.rows])

    by_row = kind.streamed(blocks, add if differentiate else None)
    return (by_row - positive_logits).sum(), gradients


def differentiable(compute: Callable[..., Computed], left: Tensor, right: Tensor) -> Tensor:
    """Return the value of a loss, differentiable if its inputs require a gradient."""
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        total: Tensor = _Differentiable.apply(left, right, compute)
        return total
    return compute(left, right, differentiate=False)[0]


class _Differentiable(torch.autograd.Function):
    """A loss as one node of the graph, whose gradients are computed together with its value."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, compute: Callable[..., Any]) -> Any:
        total, gradients = compute(images, texts, differentiate=True)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because copies would take memory for each pair of a step
        parts = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part.mul_(gradient) if needed else None for part, needed in parts), None


def _softmax(logits: Tensor) -> Tensor:
    return (logits.logsumexp(1) + logits.logsumexp(0)) / 2


def _softmax_streamed(blocks: Blocks, add: Add | None) -> Tensor:
    rows, by_column = list[Tensor](), None
    for block in blocks():
        rows.append(logsumexp(block, 1))
        columns = logsumexp(block, 0)
        # Added up at once: the columns of all blocks would be as many numbers as the logits of some
        by_column = columns if by_column is None else torch.logaddexp(by_column, columns)
    by_row = torch.cat(rows)
    assert by_column is not None
    if add:
        for block in blocks():
            gradient = torch.sub(block.logits, by_row[block.rows, None], out=block.scratch).exp_()
            gradient += block.logits.sub_(by_column).exp_()
            add(block, gradient.mul_(0.5))
    return (by_row + by_column) / 2


def logsumexp(block: Block, dim: int) -> Tensor:
    """Compute ``torch.logsumexp`` of the block's logits in its scratch memory."""
    most = block.logits.amax(dim, keepdim=True)
    most.masked_fill_(most.isneginf(), 0)  # all masked: -inf - -inf would be NaN
    terms = torch.sub(block.logits, most, out=block.scratch).exp_()
    return terms.sum(dim).log_() + most.squeeze(dim)


def _sigmoid(logits: Tensor) -> Tensor:
    return softplus(logits, threshold=40).sum(1)  # the default, 20, is too low for float64


def _sigmoid_streamed(blocks: Blocks, add: Add | None) -> Tensor:
    totals: Tensor | None = None
    for block in blocks():
        zero = block.logits.new_zeros(())
        if totals is None:
            totals = block.logits.new_empty(block.logits.shape[1])
        # A tensor for each block would fragment the heap
        totals[block.rows] = torch.logaddexp(block.logits, zero, out=block.scratch).sum(1)
        if add:
            add(block, block.logits.sigmoid_())
    assert totals is not None
    return totals


@dataclass(frozen=True)
class Loss:
    """The function of all logits in a loss, without the positives, in two forms.

    ``whole`` maps the masked logits, [N, N], to a value for each row, [N]. ``streamed`` computes
    the same from blocks and, if ``add`` is given, calls it with the gradient of each. In a pairwise
    loss every positive has a weight of 1 and the model's bias is used. Otherwise the positives of a
    row share a weight of 1.
    """

    whole: Callable[[Tensor], Tensor]
    streamed: Callable[[Blocks, Add | None], Tensor]
    pairwise: bool = False


LOSSES = {
    "clip": Loss(_softmax, _softmax_streamed),
    "siglip": Loss(_sigmoid, _sigmoid_streamed, pairwise=True),
}
