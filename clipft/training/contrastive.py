"""CLIP's loss over the effective batch, in the memory of a micro-batch.

The loss compares every image with every text of the batch, so averaging the losses of
micro-batches is another loss with fewer negatives. ``ExactAccumulation`` keeps it whole
(GradCache, Gao et al. 2021, arXiv:2101.06983): embed all micro-batches without a graph,
take the loss and its gradient with respect to the embeddings, then run each micro-batch
once more and push its part of that gradient through. The gradients are those of one large
batch; the cost is a second forward pass of the towers that learn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from clipft.data.loader import Batch
from clipft.data.order import derived_seed
from clipft.modelling.adapt import TrainableModel
from clipft.training.precision import Precision


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross entropy of unit embeddings [N, D] (Radford et al. 2021, figure 3)."""
    logits = logit_scale.exp() * images @ texts.T
    target = torch.arange(len(images), device=images.device)
    by_image = functional.cross_entropy(logits, target)
    by_text = functional.cross_entropy(logits.T, target)
    return (by_image + by_text) / 2


class Accumulation(Protocol):
    """Leaves the gradient of a step in the parameters; returns its loss, detached."""

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor: ...


@dataclass(frozen=True)
class _Encoder:
    """Both towers under the run's precision, with the dropout of (seed, step, micro-batch).

    Reseeding before each pass is what makes a second pass draw the masks of the first, and
    what frees a resumed run from restoring any random state.
    """

    model: TrainableModel
    precision: Precision
    scaler: "torch.amp.GradScaler"
    seed: int

    def images(self, step: int, micro: int, batch: Batch) -> Tensor:
        torch.manual_seed(derived_seed(self.seed, step, micro, 0))
        with self.precision.autocast():
            return self.model.encode_images(batch.pixel_values)

    def texts(self, step: int, micro: int, batch: Batch) -> Tensor:
        torch.manual_seed(derived_seed(self.seed, step, micro, 1))
        with self.precision.autocast():
            return self.model.encode_texts(batch.input_ids)

    def loss(self, images: Tensor, texts: Tensor) -> Tensor:
        return contrastive_loss(images, texts, self.model.logit_scale)


@dataclass(frozen=True)
class ExactAccumulation(_Encoder):
    """The loss of the whole effective batch. One micro-batch needs no second pass."""

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        if len(micro_batches) == 1:
            return self._at_once(step, micro_batches[0])
        batches = [batch.to(self.precision.device) for batch in micro_batches]
        with torch.no_grad():
            images = [self.images(step, i, batch) for i, batch in enumerate(batches)]
            texts = [self.texts(step, i, batch) for i, batch in enumerate(batches)]
        image_leaf = torch.cat(images).requires_grad_()
        text_leaf = torch.cat(texts).requires_grad_()
        loss = self.loss(image_leaf, text_leaf)
        torch.autograd.backward(self.scaler.scale(loss))
        for i, (batch, image_grad, text_grad) in enumerate(
            zip(batches, _like(image_leaf, images), _like(text_leaf, texts), strict=True)
        ):
            if self.model.learns_images:
                torch.autograd.backward(self.images(step, i, batch), image_grad)
            if self.model.learns_texts:
                torch.autograd.backward(self.texts(step, i, batch), text_grad)
        return loss.detach()

    def _at_once(self, step: int, batch: Batch) -> Tensor:
        batch = batch.to(self.precision.device)
        loss = self.loss(self.images(step, 0, batch), self.texts(step, 0, batch))
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()


def _like(leaf: Tensor, parts: list[Tensor]) -> Iterator[Tensor]:
    """The gradient of ``leaf``, cut as ``parts`` are."""
    assert leaf.grad is not None
    yield from torch.split(leaf.grad, [len(part) for part in parts])


@dataclass(frozen=True)
class LocalAccumulation(_Encoder):
    """The mean of the micro-batches' own losses: fewer negatives, one forward pass."""

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        total = sum(len(batch) for batch in micro_batches)
        mean = torch.zeros((), device=self.precision.device)
        for i, micro_batch in enumerate(micro_batches):
            batch = micro_batch.to(self.precision.device)
            loss = self.loss(self.images(step, i, batch), self.texts(step, i, batch))
            share = loss * (len(batch) / total)
            torch.autograd.backward(self.scaler.scale(share))
            mean += share.detach()
        return mean


ACCUMULATIONS: dict[str, type[ExactAccumulation] | type[LocalAccumulation]] = {
    "exact": ExactAccumulation,
    "local": LocalAccumulation,
}
