"""A model + a data set -> one embedding per pair."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from clipft.data.loader import NO_PAIRS, Batch
from clipft.data.shards.index import Skipped
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.core.errors import DataError
from clipft.evaluation.retrieval import Retrieval, retrieval
from clipft.models.trainable import TrainableModel
from clipft.embedding.load import LoadedModel
from clipft.data.positives import Positives
from clipft.training.shared_steps import Rounds
from clipft.embedding.towers import Side, Sides
from clipft.words import counted


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


@dataclass(frozen=True)
class _Own(Embeddings):
    """This process's; ``captions``, int64 [N], tells them apart."""

    captions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def embed(
    model: TrainableModel,
    sides: Sides,
    batches: Iterator[Batch],
    positives: Positives,
    rounds: Rounds,
) -> Embeddings:
    """Embed all pairs with dropout off; the model's mode is put back. Each process has its own
    ``batches``, as many as the others; all get the embeddings of all, in the order of ranks.

    Raises:
        DataError: none of them can be used.
        Interrupted: as the check of ``rounds`` has it.
    """
    processes = rounds.processes
    own = _embed_own(model, sides, rounds.of(batches), positives)
    skipped = tuple(chain.from_iterable(processes.gather_objects(own.skipped)))
    numbers = tuple(chain.from_iterable(processes.gather_objects(own.numbers)))
    if not numbers:
        raise _nothing(skipped)
    groups = None if own.groups is None else processes.gather_rows(own.groups)
    images, texts = processes.gather_rows(own.images), processes.gather_rows(own.texts)
    texts = _alike(texts, processes.gather_rows(own.captions))
    return Embeddings(images, texts, numbers, skipped, groups)


def _alike(texts: Tensor, captions: Tensor) -> Tensor:
    """Equal captions get the row of the first: of other batches they differ by rounding, which
    would break the ties that they are."""
    _, first, which = np.unique(captions.numpy(), return_index=True, return_inverse=True)
    return texts[torch.from_numpy(first[which])]


@torch.inference_mode()
def _embed_own(
    model: TrainableModel, sides: Sides, batches: Iterable[Batch], positives: Positives
) -> _Own:
    was_training = model.training
    model.eval()
    images, texts = [torch.empty(0)], [torch.empty(0)]
    captions = [torch.empty(0, dtype=torch.int64)]
    groups = [] if (none := positives.ids(NO_PAIRS)) is None else [none]
    numbers, skipped = list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        images.append(_rows(sides.images, batch)[0])
        rows, keys = _rows(sides.texts, batch)
        texts.append(rows)
        captions.append(keys)
        ids = positives.ids(batch)
        groups += [] if ids is None else [ids]
        numbers += batch.numbers
    model.train(was_training)
    return _Own(
        torch.cat(images),
        torch.cat(texts),
        tuple(numbers),
        tuple(skipped),
        torch.cat(groups) if groups else None,
        torch.cat(captions),
    )


def _rows(side: Side, batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, D] and the keys of what was encoded, int64 [B], on the CPU."""
    cut = side.cut([batch.to(side.precision.device)] if len(batch) else [])
    rows = [side.encode(0, piece) for piece in cut.pieces]
    if not rows:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    keys = torch.from_numpy(np.concatenate([piece.keys for piece in cut.pieces]).astype(np.int64))
    return torch.cat(rows)[cut.order].cpu(), keys[cut.order.cpu()]


@torch.inference_mode()
def embed_texts(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Texts of no data set, float32 [texts, D] of unit length, on the CPU."""
    inputs, precision = loaded.base.inputs, loaded.precision
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(texts)], encoder.end)
    with precision.autocast():
        return loaded.model.eval().encode_texts(ids.to(precision.device)).cpu()


def _nothing(skipped: Sequence[Skipped]) -> DataError:
    first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    return DataError(
        f"none of the {counted(len(skipped), 'pair')} can be used{first}",
        "`clipft inspect` names what is broken",
    )
