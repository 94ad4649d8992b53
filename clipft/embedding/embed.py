"""A model + a data set -> one embedding per pair."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.data.loader import EMPTY_BATCH, Batch, LoaderOptions, PairSource, evaluation_batches
from clipft.data.order import Share
from clipft.data.positives import NO_GROUPS, Positives
from clipft.data.shards.dataset import PairDataset, open_pairs
from clipft.data.skipped import Skipped
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import in_lockstep
from clipft.embedding.encoding import Encoding
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Tower, Towers
from clipft.metrics.ranking import Retrieval, retrieval
from clipft.models.trainable import TrainableModel


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
    towers: Towers,
    batches: Iterator[Batch],
    positives: Positives,
    processes: Processes,
    check: Callable[[], None],
) -> Embeddings:
    """Embed all pairs with dropout off; the model's mode is put back. Each process has its own
    ``batches``, as many as the others; all get the embeddings of all, in the order of ranks.

    Raises:
        DataError: none of them can be used.
        Interrupted: as the check of ``rounds`` has it.
    """
    own = _embed_own(model, towers, in_lockstep(processes, batches, check), positives)
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
    model: TrainableModel, towers: Towers, batches: Iterable[Batch], positives: Positives
) -> _Own:
    was_training = model.training
    model.eval()
    images, texts = [torch.empty(0)], [torch.empty(0)]
    captions = [torch.empty(0, dtype=torch.int64)]
    groups = [] if (none := positives.ids(EMPTY_BATCH)) is None else [none]
    numbers, skipped = list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        images.append(_rows(towers.images, batch)[0])
        rows, keys = _rows(towers.texts, batch)
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


def _rows(tower: Tower, batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, D] and the keys of what was encoded, int64 [B], on the CPU."""
    cut = tower.cut([batch.to(tower.precision.device)] if len(batch) else [])
    rows = [tower.encode(0, chunk) for chunk in cut.chunks]
    if not rows:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    keys = torch.from_numpy(np.concatenate([chunk.keys for chunk in cut.chunks]).astype(np.int64))
    return torch.cat(rows)[cut.order].cpu(), keys[cut.order.cpu()]


@torch.inference_mode()
def embed_texts(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Texts of no data set, float32 [texts, D] of unit length, on the CPU."""
    inputs, precision = loaded.base.inputs, loaded.precision
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(texts)], encoder.eos_token_id)
    with precision.autocast():
        return loaded.model.eval().encode_texts(ids.to(precision.device)).cpu()


def _nothing(skipped: Sequence[Skipped]) -> DataError:
    first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    return DataError(
        f"none of the {counted(len(skipped), 'pair')} can be used{first}",
        "`clipft inspect` names what is broken",
    )


_BATCH = 64
"""Pairs per forward pass without gradients, where no micro-batch is set."""


def validation_pairs(settings: Settings) -> PairDataset:
    """``{data_dir}/val``, or ``data_dir`` itself where the shards lie directly in it."""
    nested = settings.data_dir / "val"
    flat = not nested.exists() and any(settings.data_dir.glob("*.tar"))
    return open_pairs(settings.data_dir if flat else nested, settings.max_val_pairs)


def embed_pairs(
    loaded: LoadedModel,
    pairs: PairSource,
    how: Encoding,
    settings: Settings,
    positives: Positives = NO_GROUPS,
    processes: Processes = ALONE,
    check: Callable[[], None] = lambda: None,
) -> Embeddings:
    """Each process embeds its share; all get all, in the pairs' own order.

    Raises:
        DataError: more of the pairs are unreadable than ``max_bad`` allows.
        Interrupted: as the check of ``rounds`` has it.
    """
    share, device = Share(processes.rank, processes.world_size), loaded.precision.device
    options = LoaderOptions.from_settings(settings, device, share, processes.local_world_size)
    batch_size = settings.micro_batch_size or _BATCH
    batches = evaluation_batches(pairs, how.preprocessing, batch_size, options)
    embedded = embed(loaded.model, how.towers, batches, positives, processes, check)
    _check_bad_share(embedded, len(pairs), settings)
    return embedded


def _check_bad_share(embedded: Embeddings, pairs: int, settings: Settings) -> None:
    """
    Raises:
        DataError: more than ``max_bad`` of the pairs, and more than one, are unreadable.
    """
    bad = embedded.skipped
    if settings.too_many_bad(len(bad), pairs):
        raise DataError(
            f"{len(bad)} of {pairs} validation pairs could not be used, more than --max-bad "
            f"{settings.max_bad:g}: first {bad[0].key} in {bad[0].shard} ({bad[0].reason})",
            "`clipft inspect` names what is broken; mend it, or raise --max-bad",
        )
