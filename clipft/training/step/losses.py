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

from clipft.config.settings import LossSettings
from clipft.models.trainable import TrainableModel

BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits that exist at once, by device; the work needs as much again. More is slower on a CPU."""


class _Targets(Protocol):
    """Which pairs attract. ``first`` is the row of the batch at which a block begins; ``work``
    is memory of the block's size."""

    def mask(self, logits: Tensor, first: int) -> None:
        """Put -inf, in place, where neither is the other's negative or positive."""

    def positive_logits(self, logits: Tensor, first: int, work: Tensor) -> Tensor:
        """The block's logits weighted by its targets, summed."""

    def subtract(self, gradient: Tensor, first: int, times: float, work: Tensor) -> None:
        """Take ``times`` the targets off, in place."""


@dataclass(frozen=True)
class _Pairs:
    """Image i and text i."""

    def mask(self, logits: Tensor, first: int) -> None:
        return

    def positive_logits(self, logits: Tensor, first: int, work: Tensor) -> Tensor:
        return logits.diagonal(first).sum()

    def subtract(self, gradient: Tensor, first: int, times: float, work: Tensor) -> None:
        gradient.diagonal(first).sub_(times)


class _Groups:
    """``ids``, int64 [N]. A block of which rows have the same; again in the same memory."""

    def __init__(self, ids: Tensor, rows: int) -> None:
        self._ids = ids
        self._same = ids.new_empty(rows, len(ids), dtype=torch.bool)

    def same(self, first: int, rows: int) -> Tensor:
        return torch.eq(self._ids[first : first + rows, None], self._ids, out=self._same[:rows])


@dataclass(frozen=True)
class _Masked(_Pairs):
    """Image i and text i; others of their group are left out."""

    groups: _Groups

    def mask(self, logits: Tensor, first: int) -> None:
        others = self.groups.same(first, len(logits))
        others.diagonal(first).fill_(False)
        logits.masked_fill_(others, -math.inf)


@dataclass(frozen=True)
class _Soft:
    """All of a group, each with the weight [N] of its row."""

    groups: _Groups
    weights: Tensor

    def mask(self, logits: Tensor, first: int) -> None:
        return

    def positive_logits(self, logits: Tensor, first: int, work: Tensor) -> Tensor:
        return self._fill(work, first).mul_(logits).sum()

    def subtract(self, gradient: Tensor, first: int, times: float, work: Tensor) -> None:
        gradient.sub_(self._fill(work, first), alpha=times)

    def _fill(self, work: Tensor, first: int) -> Tensor:
        rows = len(work)
        work.copy_(self.groups.same(first, rows))
        return work.mul_(self.weights[first : first + rows, None])


@dataclass(frozen=True)
class _Evaluated:
    """A loss, and its gradients where they were wanted."""

    value: Tensor
    gradients: "_Gradients | None"


class _Logits:
    """Blocks of scale x images x texts + bias, computed anew each time they are gone through;
    a single block is kept. They all lie in the same memory: one allocated for each of them
    leaves a CPU's heap in fragments of many times its size."""

    def __init__(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, rows: int
    ) -> None:
        self.images, self.texts, self.scale, self.bias = images, texts, scale, bias
        self.size, self.rows = len(images), rows
        self._block, self._work = images.new_empty(2, self.rows, self.size)
        self._kept = False

    def blocks(self, targets: _Targets) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, logits [rows, N] with what ``targets`` leave out at -inf, as much memory
        to work in)."""
        for first in range(0, self.size, self.rows):
            block, work = self._block[: self.size - first], self._work[: self.size - first]
            if not self._kept:
                scaled = self.images[first : first + self.rows] * self.scale
                torch.mm(scaled, self.texts.T, out=block)
                if self.bias is not None:
                    block += self.bias
                targets.mask(block, first)
                self._kept = self.rows == self.size
            yield first, block, work


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
    positive_logits = logits.images.new_zeros(())
    for first, block, work in logits.blocks(targets):
        positive_logits += targets.positive_logits(block, first, work)
        rows.append(_logsumexp(block, 1, work))
        summed = _logsumexp(block, 0, work)
        columns = summed if columns is None else torch.logaddexp(columns, summed)
    assert columns is not None
    by_image = torch.cat(rows)
    value = ((by_image.sum() + columns.sum()) / 2 - positive_logits) / n
    if not with_gradients:
        return _Evaluated(value, None)
    gradients = _Gradients(logits)
    for first, block, work in logits.blocks(targets):
        by_row = by_image[first : first + len(block), None]
        gradient = torch.sub(block, by_row, out=work).exp_()
        gradient += block.sub_(columns).exp_()  # the block is not looked at again
        targets.subtract(gradient, first, 2.0, block)
        gradients.add(first, gradient.div_(2 * n))
    return _Evaluated(value, gradients)


def _logsumexp(block: Tensor, dim: int, work: Tensor) -> Tensor:
    """torch's own allocates as much as the block each time."""
    most = block.amax(dim, keepdim=True)
    most.masked_fill_(most.isneginf(), 0)  # all left out
    return torch.sub(block, most, out=work).exp_().sum(dim).log_() + most.squeeze(dim)


def _sigmoid(logits: _Logits, targets: _Targets, with_gradients: bool) -> _Evaluated:
    """Binary cross entropy of every image with every text, summed over the texts."""
    n, value = logits.size, logits.images.new_zeros(())
    gradients = _Gradients(logits) if with_gradients else None
    for first, block, work in logits.blocks(targets):
        # log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which cannot overflow
        value += torch.abs(block, out=work).neg_().exp_().log1p_().sum()
        value += torch.clamp(block, min=0, out=work).sum()
        value -= targets.positive_logits(block, first, work)
        if gradients:
            gradient = block.sigmoid_()
            targets.subtract(gradient, first, 1.0, work)
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
    block_logits: int | None = None
    """None: ``BLOCK_LOGITS``."""

    def __call__(self, images: Tensor, texts: Tensor, groups: Tensor | None = None) -> Tensor:
        """Of unit embeddings, float32 [N, D] each; a scalar.

        ``groups``, int64 [N]: rows with equal ids are no negatives of each other; None: each
        row is its own group. Differentiable once, in the embeddings and in the model's
        ``logit_scale`` and ``logit_bias``.
        """
        at_once = self.block_logits or BLOCK_LOGITS.get(images.device.type, BLOCK_LOGITS["cuda"])
        rows = min(max(1, at_once // len(images)), len(images))
        task = _Task(self.evaluate, self._targets(groups, images, rows), rows)
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

    def _targets(self, groups: Tensor | None, like: Tensor, rows: int) -> _Targets:
        if groups is None:
            return _Pairs()
        groups = groups.to(like.device)
        if self.masked:
            return _Masked(_Groups(groups, rows))
        sizes = _sizes(groups).to(like.dtype)
        weights = 1 / sizes if self.name == "clip" else torch.ones_like(sizes)
        return _Soft(_Groups(groups, rows), weights)


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
