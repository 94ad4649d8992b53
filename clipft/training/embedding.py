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
from clipft.training.precision import Precision


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
def embed(model: TrainableModel, batches: Iterable[Batch], precision: Precision) -> Embeddings:
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
        moved = batch.to(precision.device)
        with precision.autocast():
            images.append(model.encode_images(moved.pixel_values).cpu())
            texts.append(model.encode_texts(moved.input_ids).cpu())
        numbers += batch.numbers
    model.train(was_training)
    if not numbers:
        raise _nothing(skipped)
    scale = float(model.logit_scale.detach().exp())
    return Embeddings(torch.cat(images), torch.cat(texts), tuple(numbers), tuple(skipped), scale)


def _nothing(skipped: list[Skipped]) -> DataError:
    first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    return DataError(f"none of the {len(skipped)} pairs can be used{first}", "mend the data")
