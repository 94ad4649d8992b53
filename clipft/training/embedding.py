"""A model + a data set -> one embedding per pair."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipft.data.loader import Batch
from clipft.data.shard_index import Skipped
from clipft.errors import DataError
from clipft.evaluation.retrieval import Retrieval, retrieval, validation_loss
from clipft.modelling.adapt import TrainableModel
from clipft.training.sides import Side, Sides


@dataclass(frozen=True)
class Embeddings:
    """Unit rows, float32 [N, D], on the CPU; ``numbers`` are the pairs' in the data set."""

    images: Tensor
    texts: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    scale: float

    def retrieval(self, memory: int) -> Retrieval:
        return retrieval(self.images, self.texts, memory)

    def loss(self, memory: int) -> float:
        return validation_loss(self.images, self.texts, self.scale, memory)


@torch.inference_mode()
def embed(model: TrainableModel, sides: Sides, batches: Iterable[Batch]) -> Embeddings:
    """Embed all pairs with dropout off; the model's mode is put back.

    Raises:
        DataError: none of them can be used.
    """
    was_training = model.training
    model.eval()
    images, texts, numbers, skipped = [], [], list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        if not len(batch):
            continue
        images.append(_rows(sides.images, batch))
        texts.append(_rows(sides.texts, batch))
        numbers += batch.numbers
    model.train(was_training)
    if not numbers:
        raise _nothing(skipped)
    scale = float(model.logit_scale.detach().exp())
    return Embeddings(torch.cat(images), torch.cat(texts), tuple(numbers), tuple(skipped), scale)


def _rows(side: Side, batch: Batch) -> Tensor:
    """[B, D], on the CPU."""
    cut = side.cut([batch.to(side.precision.device)])
    rows = torch.cat([side.encode(0, piece) for piece in cut.pieces])
    return rows[cut.order].cpu()


def _nothing(skipped: list[Skipped]) -> DataError:
    first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    return DataError(f"none of the {len(skipped)} pairs can be used{first}", "mend the data")
