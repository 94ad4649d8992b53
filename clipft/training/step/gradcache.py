"""The loss over the effective batch, in the memory of a micro-batch.

The loss compares every image with every text of the batch, so the mean of the losses of
micro-batches is a different loss, with fewer negatives. ``ExactAccumulation`` computes the loss of
the whole batch (GradCache, Gao et al. 2021, arXiv:2101.06983):

1. embed all pairs, chunk by chunk;
2. compute the loss over all embeddings, and its gradient with respect to the embeddings;
3. backpropagate each chunk's part of this gradient through its tower. If the graph of a chunk did
   not fit in memory, the chunk runs forward again first.

The gradients are those of one large batch, on any number of processes: each process embeds its own
pairs, and all processes get all embeddings. A penalty on the drift of the embeddings
(``--preserve``) is a sum over rows, so each process adds it for its own rows between 2 and 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clipft.data.batch import Batch, StepBatch
from clipft.data.positives import Positives
from clipft.distributed.step_channel import ALONE, StepChannel
from clipft.embedding.finite import not_finite_rows
from clipft.embedding.towers import Towers
from clipft.models.trainable import TrainableModel
from clipft.training.step.losses import ContrastiveLoss
from clipft.training.step.oom import Recovery
from clipft.training.step.preservation import NOTHING_PRESERVED, OwnRows, Preservation
from clipft.training.step.tower_pass import GraphMemory, TowerPass, backward
from clipft.training.step.weights import WHOLE_WEIGHTS, Weights


@dataclass
class Accumulation(ABC):
    """Computes the loss of a step and leaves its gradient in the parameters.

    With several processes, each has its own micro-batches, and all get the same gradient and loss.
    ``lower_bound`` is the smallest loss that any model could have on the pairs of the last step.
    ``drift`` is how far their embeddings were from the pretrained ones, if ``preservation``
    measures it.
    """

    smallest_micro_batch: ClassVar[int]
    if_smaller: ClassVar[str]
    """The effect of smaller micro-batches on the loss, as the end of a warning."""

    model: TrainableModel
    towers: Towers
    loss: ContrastiveLoss
    positives: Positives
    scaler: "torch.amp.GradScaler"
    graphs: GraphMemory
    products: Tensor | None = None
    """The product of each training pair, int64 [pairs], if its photos attract each other."""
    channel: StepChannel = ALONE
    weights: Weights = WHOLE_WEIGHTS
    recovery: Recovery = field(default_factory=Recovery)
    preservation: Preservation = NOTHING_PRESERVED
    drift: float | None = field(default=None, init=False)
    lower_bound: float = field(default=0.0, init=False)
    _embedded: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list, init=False)
    """Pair numbers and embeddings of the last step, without their graphs."""

    @abstractmethod
    def __call__(
        self,
        step: int,
        micro_batches: list[Batch],
        pairs: int | None = None,
        general: Sequence[Batch] = (),
    ) -> Tensor:
        """Add the gradient of ``step`` (from 0) to the parameters; return its detached loss.

        ``pairs`` is the number of pairs on all processes, by default that of ``micro_batches``.
        ``general`` holds micro-batches of the general set. The loss does not include the penalty.
        """

    def start_to_copy(self, batch: StepBatch) -> None:
        """Start to copy the first images of a step to the device, during the step before."""
        for micro_batch in batch.micro_batches[:1]:
            self.towers.images.transfer.start(micro_batch.pixel_values)

    def not_finite(self) -> list[tuple[str, int]]:
        """List the embeddings of this process that were NaN or infinite in the last step, as
        ``image`` or ``caption`` and the number of the pair."""
        return [
            (what, numbers[row])
            for numbers, images, texts in self._embedded
            for what, rows in (("image", images), ("caption", texts))
            for row in not_finite_rows(rows)
        ]

    def _keep_rows(self, batches: Sequence[Batch], images: Tensor, texts: Tensor) -> None:
        numbers = [number for batch in batches for number in batch.numbers]
        self._embedded.append((numbers, images.detach(), texts.detach()))

    def _passes(self, step: int) -> tuple[TowerPass, TowerPass]:
        """The passes through both towers of one step, or of one micro-batch of it."""
        self.graphs.begin_step()
        towers = (self.towers.images, self.towers.texts)
        images, texts = (TowerPass(tower, self.graphs, step) for tower in towers)
        return images, texts

    def _groups(self, batches: Sequence[Batch]) -> tuple[Tensor | None, Tensor | None]:
        """Ids of the groups and of the products of this process's pairs, int64 [pairs] each; None
        if each pair is its own group."""
        known = [i for i in map(self.positives.ids, batches) if i is not None]
        numbers = [number for batch in batches for number in batch.numbers]
        products = None if self.products is None else self.products[numbers]
        return torch.cat(known) if known else None, products


class ExactAccumulation(Accumulation):
    """The loss over the whole effective batch."""

    smallest_micro_batch = 1
    if_smaller = "the effective batch and the loss stay as they were"

    def __call__(
        self,
        step: int,
        micro_batches: list[Batch],
        pairs: int | None = None,
        general: Sequence[Batch] = (),
    ) -> Tensor:
        self._embedded.clear()
        batches = self.recovery.split(micro_batches)
        images, texts = self._passes(step)
        image_rows, text_rows = images.embed(batches), texts.embed(batches)
        self._keep_rows(batches, image_rows, text_rows)
        everyone = self.channel.exchange(image_rows, text_rows, *self._groups(batches))
        loss = self.loss(*everyone)
        self.lower_bound = self.loss.lower_bound(everyone.groups, everyone.products)
        own = OwnRows(step, batches, image_rows, text_rows, len(everyone.images))
        penalty = self.preservation.penalty(own, self.recovery.split([*general]), self.graphs)
        total = loss + penalty.value
        if total.requires_grad:  # not if both towers are frozen
            torch.autograd.backward(self.scaler.scale(total))
        backward(images, texts, *penalty.passes)
        # Every process computes the loss of all pairs, so the gradients of temperature and bias,
        # which the loss reads directly, are already complete on each process
        scalars = [p for _, p in self.model.trainable() if p.ndim == 0 or p.shape == (1,)]
        sums = self.weights.sum_gradients(self.model, self.channel, scalars, [penalty.number()])
        self.drift = self.preservation.drift(sums[0])
        return loss.detach()


class LocalAccumulation(Accumulation):
    """The mean of the micro-batches' own losses, which have fewer negatives."""

    smallest_micro_batch = 2  # a single pair has no negatives: its loss is 0 whatever the model
    if_smaller = "each has fewer negatives, which changes the loss"

    def __call__(
        self,
        step: int,
        micro_batches: list[Batch],
        pairs: int | None = None,
        general: Sequence[Batch] = (),
    ) -> Tensor:
        self._embedded.clear()
        device = self.towers.images.precision.device
        micro_batches = self.recovery.split(micro_batches)
        pairs = pairs or sum(map(len, micro_batches))
        mean, lower_bound = torch.zeros((), device=device), 0.0
        for micro_batch in self.weights.even_out(micro_batches):
            batches = [micro_batch] if len(micro_batch) else []
            images, texts = self._passes(step)
            image_rows, text_rows = images.embed(batches), texts.embed(batches)
            if batches:
                self._keep_rows(batches, image_rows, text_rows)
                groups, weight = self._groups([micro_batch]), len(micro_batch) / pairs
                share = self.loss(image_rows, text_rows, *groups) * weight
                lower_bound += self.loss.lower_bound(*groups) * weight
                if share.requires_grad:
                    torch.autograd.backward(self.scaler.scale(share))
                mean += share.detach()
            backward(images, texts)
        alone = self.channel is ALONE  # then this need not wait for the device
        figures = (0.0 if alone else float(mean), lower_bound)
        loss, self.lower_bound = self.weights.sum_gradients(
            self.model, self.channel, figures=figures
        )
        return mean if alone else torch.tensor(loss)


ACCUMULATIONS: dict[str, type[ExactAccumulation] | type[LocalAccumulation]] = {
    "exact": ExactAccumulation,
    "local": LocalAccumulation,
}
