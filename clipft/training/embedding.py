"""A model + a data set -> one embedding per pair."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipft.data.loader import Batch
from clipft.data.shard_index import Skipped
from clipft.errors import DataError
from clipft.evaluation.retrieval import Retrieval, retrieval
from clipft.modelling.adapt import TrainableModel
from clipft.training.positives import Positives
from clipft.training.sides import Side, Sides


@dataclass(frozen=True)
class Embeddings:
    """Unit rows, float32 [N, D], on the CPU; ``numbers`` are the pairs' in the data set."""

    images: Tensor
    texts: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    groups: Tensor | None = None
    """int64 [N]: pairs that are no negatives of each other; None: each for itself."""

    def retrieval(self, memory: int) -> Retrieval:
        return retrieval(self.images, self.texts, memory)


@torch.inference_mode()
def embed(
    model: TrainableModel, sides: Sides, batches: Iterable[Batch], positives: Positives
) -> Embeddings:
    """Embed all pairs with dropout off; the model's mode is put back.

    Raises:
        DataError: none of them can be used.
    """
    was_training = model.training
    model.eval()
    images, texts, groups = list[Tensor](), list[Tensor](), list[Tensor]()
    numbers, skipped = list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        if not len(batch):
            continue
        images.append(_rows(sides.images, batch))
        texts.append(_rows(sides.texts, batch))
        ids = positives.ids(batch)
        groups += [] if ids is None else [ids]
        numbers += batch.numbers
    model.train(was_training)
    if not numbers:
        raise _nothing(skipped)
    return Embeddings(
        torch.cat(images),
        torch.cat(texts),
        tuple(numbers),
        tuple(skipped),
        torch.cat(groups) if groups else None,
    )


def _rows(side: Side, batch: Batch) -> Tensor:
    """[B, D], on the CPU."""
    cut = side.cut([batch.to(side.precision.device)])
    rows = torch.cat([side.encode(0, piece) for piece in cut.pieces])
    return rows[cut.order].cpu()


def _nothing(skipped: list[Skipped]) -> DataError:
    first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    return DataError(f"none of the {len(skipped)} pairs can be used{first}", "mend the data")
