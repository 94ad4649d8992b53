"""The loss of a run: between images and texts and, with ``photo_pairs``, between photos.

Rows of the same group are never negatives of each other: ``soft`` makes them positives, in softmax
with equal shares; ``mask`` removes them from the comparison. A small matrix of logits is computed
at once, with autograd, and a large one in blocks of rows (see ``logits``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipft.config.sections.model import LossSettings
from clipft.core.errors import UsageError
from clipft.models.trainable import TrainableModel
from clipft.training.step.logits import (
    LOSSES,
    Loss,
    Targets,
    differentiable,
    streamed_loss,
    whole_loss,
)
from clipft.training.step.photo_pairs import group_sizes, photo_losses, with_partner

# Logits that exist at once, by device. The computation needs a few times as much memory. On a CPU,
# larger blocks are slower
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss of a run, for training and validation alike."""

    model: TrainableModel
    kind: Loss
    masked: bool
    block_logits: int | None = None
    """Logits that exist at once; by default those of ``BLOCK_LOGITS``."""
    dimensions: tuple[int, ...] = ()
    """Numbers of dimensions to which embeddings are also truncated (Matryoshka, Kusupati et al.
    2022, arXiv:2205.13147). The loss is the mean over these and all dimensions, with equal
    weights."""
    photo_pairs: float = 0.0
    """The weight of the loss between photos of one product."""

    def __call__(
        self,
        images: Tensor,
        texts: Tensor,
        groups: Tensor | None = None,
        products: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of unit embeddings, float32 [N, D] each, as a scalar tensor.

        ``groups``, int64 [N]: rows with equal ids are not negatives of each other; without it each
        row is its own group. ``products``, int64 [N]: images with equal ids attract each other.
        Differentiable once, in the embeddings and in the model's ``logit_scale`` and
        ``logit_bias``.
        """
        total = self._of_all_dimensions(images, texts, groups, products)
        for size in self.dimensions:
            with _full_precision(images.device):
                cut_images, cut_texts = (normalize(x[:, :size], dim=1) for x in (images, texts))
            total = total + self._of_all_dimensions(cut_images, cut_texts, groups, products)
        return total / (1 + len(self.dimensions)) if self.dimensions else total

    def _of_all_dimensions(
        self, images: Tensor, texts: Tensor, groups: Tensor | None, products: Tensor | None
    ) -> Tensor:
        total = self._between_images_and_texts(images, texts, groups)
        if products is not None and self.photo_pairs:
            total = total + self.photo_pairs * self._between_photos(images, products)
        return total

    def _between_photos(self, images: Tensor, products: Tensor) -> Tensor:
        """Return the mean over all pairs of the loss of ``photo_pairs``; it is 0 for single photos.

        The model's temperature is used, but this loss has no gradient with respect to it.
        """
        device = images.device
        at_once = self.block_logits or BLOCK_LOGITS.get(device.type, BLOCK_LOGITS["cuda"])
        rows = with_partner(products).to(device, non_blocking=True)
        if not len(rows):
            return images.new_zeros(())
        compute = partial(photo_losses, products.to(device, non_blocking=True), rows, at_once)
        with _full_precision(device):
            queries = images[rows] * self.model.logit_scale.detach().to(device).exp()
            return differentiable(compute, queries, images) / len(images)

    def _between_images_and_texts(
        self, images: Tensor, texts: Tensor, groups: Tensor | None
    ) -> Tensor:
        n, device = len(images), images.device
        at_once = self.block_logits or BLOCK_LOGITS.get(device.type, BLOCK_LOGITS["cuda"])
        targets = Targets()
        if groups is not None:
            targets = Targets(groups.to(device, non_blocking=True))
            if not self.masked:
                sizes = group_sizes(groups).to(images, non_blocking=True)
                targets.weights = torch.ones_like(sizes) if self.kind.pairwise else 1 / sizes
        with _full_precision(device):
            images = images * self.model.logit_scale.to(device).exp()
            if self.kind.pairwise and self.model.logit_bias is not None:
                # One more dimension adds the bias to every dot product
                bias = self.model.logit_bias.to(device).reshape(1, 1).expand(n, 1)
                images = torch.cat([images, bias], dim=1)
                texts = torch.cat([texts, torch.ones_like(texts[:, :1])], dim=1)
            compute = partial(whole_loss, self.kind, targets)
            if n * n > at_once:
                compute = partial(streamed_loss, self.kind, targets, max(1, at_once // n))
            return differentiable(compute, images, texts) / n

    def lower_bound(self, groups: Tensor | None, products: Tensor | None = None) -> float:
        """Return the smallest value that the loss can have for these groups and products.

        For softmax with several positives this is the entropy of the targets in nats, otherwise 0.
        """
        bound = 0.0
        if groups is not None and not self.masked and not self.kind.pairwise:
            bound += float(group_sizes(groups.cpu()).double().log().mean())
        if products is not None and self.photo_pairs:
            partners = (group_sizes(products.cpu()) - 1).clamp(min=1)
            bound += self.photo_pairs * float(partners.double().log().mean())
        return bound


def make_loss(settings: LossSettings, model: TrainableModel) -> ContrastiveLoss:
    """Make the loss that ``settings`` name; ``auto`` is that of the base model's pretraining.

    Raises:
        UsageError: the model has no more dimensions than ``matryoshka`` names.
    """
    name = model.architecture.loss if settings.loss == "auto" else settings.loss
    masked, cuts = settings.positives_mode == "mask", settings.dimensions
    if cuts and cuts[0] >= model.embedding_size:
        raise UsageError(
            f"--matryoshka {settings.matryoshka}: the embeddings have {model.embedding_size} "
            "dimensions",
            "choose smaller numbers; the loss always includes all dimensions",
        )
    weight = settings.photo_pairs
    return ContrastiveLoss(model, LOSSES[name], masked, dimensions=cuts, photo_pairs=weight)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and TF32, whose error at a scale of 100 is 0.05 of a logit."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
