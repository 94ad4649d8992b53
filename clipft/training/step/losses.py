"""The losses, each declared here alone, over a batch of any size in bounded memory.

``clip``    softmax over all texts of the batch and over all images (Radford et al. 2021).
``siglip``  each image with each text on its own, with a bias (Zhai et al. 2023).

Both consist of a part in which all pairs take part, minus the logits of the positives; what counts
as a positive changes only the second part (``_Targets``). Rows of one group are never negatives
of each other: ``soft`` makes them positives, in softmax with equal shares; ``mask`` removes them
from the comparison.

Value and gradient are computed from blocks of rows of the logits, in one pass (sigmoid) or two
(softmax, whose columns must be summed first), so the N x N logits never exist at once. Up to
``BLOCK_LOGITS`` a single block holds them all, and nothing is computed twice.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipft.config.settings import LossSettings
from clipft.models.trainable import TrainableModel

# Logits that exist at once, by device; the work needs as much again. More is slower on a CPU
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss of a run, for training and validation alike."""

    model: TrainableModel
    name: str
    masked: bool
    evaluate: "_Evaluate"
    block_logits: int | None = None
    """Logits that exist at once; by default those of ``BLOCK_LOGITS``."""

    def __call__(self, images: Tensor, texts: Tensor, groups: Tensor | None = None) -> Tensor:
        """The loss of unit embeddings, float32 [N, D] each, as a scalar tensor.

        ``groups``, int64 [N]: rows with equal ids are not negatives of each other; without it each
        row is its own group. Differentiable once, in the embeddings and in the model's
        ``logit_scale`` and ``logit_bias``.
        """
        at_once = self.block_logits or BLOCK_LOGITS.get(images.device.type, BLOCK_LOGITS["cuda"])
        rows = min(max(1, at_once // len(images)), len(images))
        weights = None
        if groups is not None:
            groups = groups.to(images.device)
        if groups is not None and not self.masked:
            sizes = _group_sizes(groups).to(images.dtype)
            weights = 1 / sizes if self.name == "clip" else torch.ones_like(sizes)
        targets = _Targets(groups, weights, rows)
        scale = self.model.logit_scale.to(images.device)
        bias = self.model.logit_bias if self.evaluate is _sigmoid else None
        loss: Tensor = _Blockwise.apply(
            images,
            texts,
            scale,
            None if bias is None else bias.to(images.device),
            _Task(self.evaluate, targets, rows),
        )
        return loss

    def lower_bound(self, groups: Tensor | None) -> float:
        """The smallest value that the loss can have for these groups.

        For softmax with shared targets this is the targets' entropy, in nats; otherwise 0.
        """
        if groups is None or self.masked or self.name != "clip":
            return 0.0
        return float(_group_sizes(groups).cpu().double().log().mean())


def make_loss(settings: LossSettings, model: TrainableModel) -> ContrastiveLoss:
    """The loss that ``settings`` name; ``auto`` is the one the base model was trained with."""
    name = model.architecture.loss if settings.loss == "auto" else settings.loss
    masked = settings.positives_mode == "mask"
    return ContrastiveLoss(model, name, masked, _EVALUATIONS[name])


def _group_sizes(groups: Tensor) -> Tensor:
    """How many rows the group of each row has, int64 [N]."""
    _, which, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sizes: Tensor = counts[which]
    return sizes


class _Targets:
    """The positives of a batch, applied to one block of its logits at a time.

    Without ``groups`` (int64 [N]) image i has text i as its only positive. With ``weights`` [N] all
    texts of its group are positives, each with the weight of its row; with groups alone the others
    of the group are masked out. In the methods ``first`` is the row of the batch at which the block
    begins, and ``work`` is memory of the block's size that may be overwritten.
    """

    def __init__(self, groups: Tensor | None, weights: Tensor | None, rows: int) -> None:
        self._groups, self._weights = groups, weights
        if groups is not None:  # one buffer for all blocks
            self._same_buffer = groups.new_empty(rows, len(groups), dtype=torch.bool)

    def mask(self, logits: Tensor, first: int) -> None:
        """Put -inf, in place, where a pair is neither positive nor negative."""
        if self._groups is not None and self._weights is None:
            others = self._same(first, len(logits))
            others.diagonal(first).fill_(False)
            logits.masked_fill_(others, -math.inf)

    def positive_logits(self, logits: Tensor, first: int, work: Tensor) -> Tensor:
        """The sum of the block's logits, weighted by its targets."""
        if self._weights is None:
            return logits.diagonal(first).sum()
        return self._fill(work, first).mul_(logits).sum()

    def subtract(self, gradient: Tensor, first: int, times: float, work: Tensor) -> None:
        """Subtract ``times`` the targets from ``gradient``, in place."""
        if self._weights is None:
            gradient.diagonal(first).sub_(times)
        else:
            gradient.sub_(self._fill(work, first), alpha=times)

    def _same(self, first: int, rows: int) -> Tensor:
        """bool [rows, N]: which rows of the batch are in the same group."""
        assert self._groups is not None
        own = self._groups[first : first + rows, None]
        return torch.eq(own, self._groups, out=self._same_buffer[:rows])

    def _fill(self, work: Tensor, first: int) -> Tensor:
        assert self._weights is not None
        rows = len(work)
        work.copy_(self._same(first, rows))
        return work.mul_(self._weights[first : first + rows, None])


class _Logits:
    """Blocks of ``scale * images @ texts.T + bias``, computed anew each time they are iterated.

    A single block is kept instead. All blocks use the same memory: with one allocation for each, a
    CPU's heap ends up in fragments of many times the size of a block.
    """

    def __init__(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, rows: int
    ) -> None:
        self.images, self.texts, self.scale, self.bias = images, texts, scale, bias
        self.size, self.rows = len(images), rows
        self._block, self._work = images.new_empty(2, self.rows, self.size)
        self._kept = False

    def blocks(self, targets: _Targets) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (first row, masked logits [rows, N], as much memory to work in)."""
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
    """Turns the gradient of the logits, block by block, into that of embeddings and bias."""

    def __init__(self, logits: _Logits) -> None:
        self._logits = logits
        self.images = torch.empty_like(logits.images)
        self.texts = torch.zeros_like(logits.texts)
        self.bias = None if logits.bias is None else torch.zeros_like(logits.bias)

    def add(self, first: int, gradient: Tensor) -> None:
        """Take in the gradient [rows, N] of the block that begins at row ``first``."""
        rows = slice(first, first + len(gradient))
        torch.matmul(gradient, self._logits.texts, out=self.images[rows])
        self.images[rows].mul_(self._logits.scale)
        self.texts.addmm_(gradient.T, self._logits.images[rows] * self._logits.scale)
        if self.bias is not None:
            self.bias += gradient.sum()


@dataclass(frozen=True)
class _Evaluated:
    """The value of a loss, and its gradients where they were wanted."""

    value: Tensor
    gradients: _Gradients | None


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
        gradient += block.sub_(columns).exp_()  # overwrites the block, which is not needed again
        targets.subtract(gradient, first, 2.0, block)
        gradients.add(first, gradient.div_(2 * n))
    return _Evaluated(value, gradients)


def _logsumexp(block: Tensor, dim: int, work: Tensor) -> Tensor:
    """``torch.logsumexp`` without its allocation of as much memory as the block."""
    most = block.amax(dim, keepdim=True)
    most.masked_fill_(most.isneginf(), 0)  # all masked: -inf - -inf would be not-a-number
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

_EVALUATIONS: dict[str, _Evaluate] = {"clip": _softmax, "siglip": _sigmoid}


@dataclass(frozen=True)
class _Task:
    evaluate: _Evaluate
    targets: _Targets
    rows: int


class _Blockwise(torch.autograd.Function):
    """A loss as one node of the graph: its gradients are computed together with its value."""

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
                by_image = found.gradients.images
                # The sum of gradient * (logit - bias) over all pairs
                by_log_scale = (images * by_image).sum().view_as(log_scale)
                ctx.save_for_backward(
                    by_image, found.gradients.texts, by_log_scale, found.gradients.bias
                )
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part * gradient if needed else None for part, needed in parts), None
