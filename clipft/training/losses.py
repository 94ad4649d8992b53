"""The losses, each declared here alone, over a batch of any size in bounded memory.

``clip``    softmax over all texts of the batch and over all images (Radford et al. 2021).
``siglip``  each image with each text on its own, with a bias (Zhai et al. 2023).

Both are a part that all pairs enter, less the logits of the positives, so what counts as a
positive changes only the second part (``_Targets``). Rows of one group are no negatives of
each other: ``soft`` makes them positives too, in softmax with equal shares; ``mask`` leaves
them out of the comparison.

Value and gradient come from blocks of rows of the logits, in one pass (sigmoid) or two
(softmax, whose columns must be summed before), so the N x N logits never exist at once. Up to
``BLOCK_LOGITS`` one block holds them all, and nothing is computed twice.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from clipft.modelling.adapt import TrainableModel
from clipft.settings import LossSettings

BLOCK_LOGITS = 1 << 24
"""Logits that exist at once: 64 MiB in fp32, of which the work needs three."""


class _Targets(Protocol):
    """Which pairs attract. ``first`` is the row of the batch at which a block begins."""

    def leave_out(self, logits: Tensor, first: int) -> None:
        """Put -inf, in place, where neither is the other's negative or positive."""

    def attraction(self, logits: Tensor, first: int) -> Tensor:
        """The block's logits weighted by its targets, summed."""

    def subtract(self, gradient: Tensor, first: int, times: float) -> None:
        """Take ``times`` the targets off, in place."""


@dataclass(frozen=True)
class _Pairs:
    """Image i and text i."""

    def leave_out(self, logits: Tensor, first: int) -> None:
        return

    def attraction(self, logits: Tensor, first: int) -> Tensor:
        return logits.diagonal(first).sum()

    def subtract(self, gradient: Tensor, first: int, times: float) -> None:
        gradient.diagonal(first).sub_(times)


@dataclass(frozen=True)
class _Masked(_Pairs):
    """Image i and text i; others of their group are left out."""

    groups: Tensor

    def leave_out(self, logits: Tensor, first: int) -> None:
        others = _same(self.groups, first, len(logits))
        others.diagonal(first).fill_(False)
        logits.masked_fill_(others, -math.inf)


@dataclass(frozen=True)
class _Soft:
    """All of a group, each with the weight [N] of its row."""

    groups: Tensor
    weights: Tensor

    def leave_out(self, logits: Tensor, first: int) -> None:
        return

    def attraction(self, logits: Tensor, first: int) -> Tensor:
        return (logits * self._block(first, len(logits))).sum()

    def subtract(self, gradient: Tensor, first: int, times: float) -> None:
        gradient.sub_(self._block(first, len(gradient)), alpha=times)

    def _block(self, first: int, rows: int) -> Tensor:
        return _same(self.groups, first, rows) * self.weights[first : first + rows, None]


def _same(groups: Tensor, first: int, rows: int) -> Tensor:
    return groups[first : first + rows, None] == groups


@dataclass(frozen=True)
class _Evaluated:
    """A loss, and its gradients where they were wanted."""

    value: Tensor
    gradients: "_Gradients | None"


@dataclass
class _Logits:
    """Blocks of scale x images x texts + bias, computed anew each time they are gone through;
    a single block is kept."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor | None
    rows: int
    _kept: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.images)

    def blocks(self, targets: _Targets) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits [rows, N]) with what ``targets`` leave out at -inf."""
        for first in range(0, self.size, self.rows):
            if self._kept is not None:
                yield first, self._kept
                continue
            logits = (self.images[first : first + self.rows] * self.scale) @ self.texts.T
            if self.bias is not None:
                logits += self.bias
            targets.leave_out(logits, first)
            if self.rows >= self.size:
                self._kept = logits
            yield first, logits


class _Gradients:
    """Gathers the gradient of the logits, block by block, into that of what made them."""

    def __init__(self, logits: _Logits) -> None:
        self._of = logits
        self.images = torch.empty_like(logits.images)
        self.texts = torch.zeros_like(logits.texts)
        self.bias = None if logits.bias is None else torch.zeros_like(logits.bias)

    def add(self, first: int, gradient: Tensor) -> None:
        rows = slice(first, first + len(gradient))
        torch.matmul(gradient, self._of.texts, out=self.images[rows])
        self.images[rows].mul_(self._of.scale)
        self.texts.addmm_(gradient.T, self._of.images[rows] * self._of.scale)
        if self.bias is not None:
            self.bias += gradient.sum()

    @property
    def log_scale(self) -> Tensor:
        """sum G * logits without bias = sum over i of <image i, its gradient>."""
        return (self._of.images * self.images).sum()


def _softmax(logits: _Logits, targets: _Targets, with_gradients: bool) -> _Evaluated:
    """Mean of both directions' cross entropies."""
    n, rows, columns = logits.size, list[Tensor](), None
    attraction = logits.images.new_zeros(())
    for first, block in logits.blocks(targets):
        attraction += targets.attraction(block, first)
        rows.append(block.logsumexp(1))
        summed = block.logsumexp(0)
        columns = summed if columns is None else torch.logaddexp(columns, summed)
    assert columns is not None
    by_image = torch.cat(rows)
    value = ((by_image.sum() + columns.sum()) / 2 - attraction) / n
    if not with_gradients:
        return _Evaluated(value, None)
    gradients = _Gradients(logits)
    for first, block in logits.blocks(targets):
        gradient = (block - by_image[first : first + len(block), None]).exp_()
        gradient += block.sub_(columns).exp_()  # the block is not looked at again
        targets.subtract(gradient, first, 2.0)
        gradients.add(first, gradient.div_(2 * n))
    return _Evaluated(value, gradients)


def _sigmoid(logits: _Logits, targets: _Targets, with_gradients: bool) -> _Evaluated:
    """Binary cross entropy of every image with every text, summed over the texts."""
    n, value = logits.size, logits.images.new_zeros(())
    gradients = _Gradients(logits) if with_gradients else None
    for first, block in logits.blocks(targets):
        value -= functional.logsigmoid(-block).sum() + targets.attraction(block, first)
        if gradients:
            gradient = block.sigmoid_()
            targets.subtract(gradient, first, 1.0)
            gradients.add(first, gradient.div_(n))
    return _Evaluated(value / n, gradients)


_Evaluate = Callable[[_Logits, _Targets, bool], _Evaluated]


@dataclass(frozen=True)
class _Task:
    evaluate: _Evaluate
    targets: _Targets
    rows: int


class _Blockwise(torch.autograd.Function):
    """A loss as one node of the graph: the gradients are made with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        task: _Task,
    ) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            logits = _Logits(images, texts, log_scale.exp(), bias, task.rows)
            found = task.evaluate(logits, task.targets, any(ctx.needs_input_grad))
        if found.gradients:
            ctx.save_for_backward(
                found.gradients.images,
                found.gradients.texts,
                found.gradients.log_scale.view_as(log_scale),
                found.gradients.bias,
            )
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part * gradient if needed else None for part, needed in parts), None


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss of a run, for training and validation alike."""

    model: TrainableModel
    name: str
    masked: bool
    evaluate: _Evaluate
    block_logits: int = BLOCK_LOGITS

    def __call__(self, images: Tensor, texts: Tensor, groups: Tensor | None = None) -> Tensor:
        """Of unit embeddings, float32 [N, D] each; a scalar.

        ``groups``, int64 [N]: rows with equal ids are no negatives of each other; None: each
        row is its own group. Differentiable once, in the embeddings and in the model's
        ``logit_scale`` and ``logit_bias``.
        """
        rows = max(1, self.block_logits // len(images))
        task = _Task(self.evaluate, self._targets(groups, images), rows)
        scale = self.model.logit_scale
        bias = self.model.logit_bias if self.evaluate is _sigmoid else None
        loss: Tensor = _Blockwise.apply(
            images,
            texts,
            scale.to(images.device),
            None if bias is None else bias.to(images.device),
            task,
        )
        return loss

    def floor(self, groups: Tensor | None) -> float:
        """The least value that the loss can have for these groups: the entropy of softmax's
        shared targets, in nats; else 0."""
        if groups is None or self.masked or self.name != "clip":
            return 0.0
        return float(_sizes(groups).cpu().double().log().mean())

    def _targets(self, groups: Tensor | None, like: Tensor) -> _Targets:
        if groups is None:
            return _Pairs()
        groups = groups.to(like.device)
        if self.masked:
            return _Masked(groups)
        sizes = _sizes(groups).to(like.dtype)
        return _Soft(groups, 1 / sizes if self.name == "clip" else torch.ones_like(sizes))


def _sizes(groups: Tensor) -> Tensor:
    """How many rows the group of each row has, int64 [N]."""
    _, which, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sizes: Tensor = counts[which]
    return sizes


_EVALUATIONS: dict[str, _Evaluate] = {"clip": _softmax, "siglip": _sigmoid}


def make_loss(settings: LossSettings, model: TrainableModel) -> ContrastiveLoss:
    """The loss that ``settings`` name; ``auto`` is the one the checkpoint was trained with."""
    name = model.architecture.loss if settings.loss == "auto" else settings.loss
    masked = settings.positives_mode == "mask"
    return ContrastiveLoss(model, name, masked, _EVALUATIONS[name])
