"""The penalty on the drift of embeddings away from the pretrained ones, for ``--preserve``.

The drift of a unit embedding is half the squared distance to the pretrained model's embedding of
the same input, which equals 1 - their cosine similarity. The mean drift of the images and captions
of a step, times the weight, is added to the loss. The rows are those of the step's own pairs, or of
the same number of pairs of a general set, which also pass through the towers.

A frozen copy of the pretrained model makes its embeddings in the same step, or reads them from the
feature cache if inputs do not change. A copy is exact in every scenario. Switching adapters off is
not exact if their initial values changed the base weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipft.data.batch import Batch
from clipft.embedding.towers import Tower, Towers
from clipft.training.step.tower_pass import GraphMemory, TowerPass


class OwnRows(NamedTuple):
    """This process's rows of a step: its micro-batches and their unit embeddings, float32 [n, D].

    ``pairs`` is the number of rows on all processes.
    """

    step: int
    batches: Sequence[Batch]
    images: Tensor
    texts: Tensor
    pairs: int


@dataclass(frozen=True)
class Penalty:
    """This process's share of a step's penalty, and the additional passes through the towers."""

    value: Tensor | float = 0.0
    passes: tuple[TowerPass, ...] = ()

    def number(self) -> float:
        """Return the value; this waits for the device, unless nothing is preserved."""
        return self.value.detach().item() if isinstance(self.value, Tensor) else self.value


class Preservation:
    """Computes the penalty on drift. This base class preserves nothing."""

    def penalty(self, own: OwnRows, general: Sequence[Batch], graphs: GraphMemory) -> Penalty:
        """Return the penalty of a step; its gradient is not computed yet."""
        return Penalty()

    def drift(self, penalty: float) -> float | None:
        """Return the mean drift of a step from its ``penalty``, summed over all processes."""
        return None


NOTHING_PRESERVED = Preservation()


@dataclass(frozen=True)
class HeldPairs(Preservation):
    """Preserves the embeddings of the training pairs, with the same augmentation as the step.

    ``pretrained`` are the towers of the pretrained model on the same pairs.
    """

    weight: float
    pretrained: Towers

    def penalty(self, own: OwnRows, general: Sequence[Batch], graphs: GraphMemory) -> Penalty:
        drift = _drift(self.pretrained, own.step, own.batches, own.images, own.texts)
        return Penalty(drift * (self.weight / own.pairs))

    def drift(self, penalty: float) -> float | None:
        return penalty / self.weight


@dataclass(frozen=True)
class HeldGeneralSet(HeldPairs):
    """Preserves the embeddings of a general set, of which a step uses ``at_once`` pairs.

    ``trained`` and ``pretrained`` are the towers of both models on this set.
    """

    trained: Towers
    at_once: int

    def penalty(self, own: OwnRows, general: Sequence[Batch], graphs: GraphMemory) -> Penalty:
        towers = (self.trained.images, self.trained.texts)
        images, texts = (TowerPass(tower, graphs, own.step) for tower in towers)
        image_rows, text_rows = images.embed(general), texts.embed(general)
        drift = _drift(self.pretrained, own.step, general, image_rows, text_rows)
        return Penalty(drift * (self.weight / self.at_once), (images, texts))


def _drift(
    pretrained: Towers, step: int, batches: Sequence[Batch], images: Tensor, texts: Tensor
) -> Tensor:
    """Return the sum of the drift of this process's pairs, each the mean of image and caption."""
    total = torch.zeros((), device=pretrained.images.precision.device)
    if not batches:
        return total
    for tower, rows in ((pretrained.images, images), (pretrained.texts, texts)):
        if rows.requires_grad:  # embeddings of a frozen tower do not drift
            total = total + (rows - _pretrained_rows(tower, step, batches)).square().sum() / 4
    return total


@torch.no_grad()
def _pretrained_rows(tower: Tower, step: int, batches: Sequence[Batch]) -> Tensor:
    made = tower.make_chunks(batches)
    rows = torch.cat([tower.encode(step, chunk) for chunk in made.chunks])
    return rows[made.order.to(rows.device)]
