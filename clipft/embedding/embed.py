"""Embeds data sets and texts with a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.data.decoding import PairSource
from clipft.data.loader import EMPTY_BATCH, Batch, LoaderOptions, evaluation_batches
from clipft.data.order import Share
from clipft.data.positives import NO_GROUPS, Positives
from clipft.data.shards.dataset import ChosenPairs, PairDataset, open_pairs
from clipft.data.shards.names import tars_in
from clipft.data.skipped import Skipped
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import in_lockstep
from clipft.embedding.encoding import Encoding, evaluation_batch
from clipft.embedding.finite import check_finite_rows
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Tower


@dataclass(frozen=True)
class Embeddings:
    """Unit embeddings of pairs, float32 [N, D] on the CPU.

    ``numbers`` are the pairs' numbers in the data set; ``skipped`` pairs have no embeddings.
    ``groups``, int64 [N], marks pairs that are not negatives of each other; None if all are.
    """

    images: Tensor
    texts: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    groups: Tensor | None = None

    def where_ranked(self, device: torch.device) -> "Embeddings":
        """The same with their rows on a CUDA device, which ranks them fastest. For another device,
        they stay on the CPU."""
        if device.type != "cuda":
            return self
        return replace(self, images=self.images.to(device), texts=self.texts.to(device))


@dataclass(frozen=True)
class _Share(Embeddings):
    """What one process embedded. ``captions``, int64 [N], is equal for equal captions."""

    captions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def validation_pairs(settings: Settings) -> PairDataset:
    """Open ``{data_dir}/val``, or ``data_dir`` itself if the shards are directly in it.

    Raises:
        DataError: there are no pairs.
    """
    nested = settings.data_dir / "val"
    flat = not nested.exists() and tars_in(settings.data_dir)
    return open_pairs(settings.data_dir if flat else nested, settings.max_val_pairs)


def evaluation_pairs(settings: Settings, split: str = "auto") -> tuple[str, PairDataset]:
    """Open the pairs to report figures on: the test pairs if there are any ("auto"), otherwise the
    validation pairs; or those of ``split``, "test" or "val". Also return which.

    Raises:
        DataError: there are no pairs.
    """
    test = settings.data_dir / "test"
    if split == "test" or (split == "auto" and tars_in(test)):
        return "test", open_pairs(test, settings.max_val_pairs)
    return "val", validation_pairs(settings)


def embed_pairs(
    loaded: LoadedModel,
    pairs: PairSource,
    how: Encoding,
    settings: Settings,
    positives: Positives = NO_GROUPS,
    processes: Processes = ALONE,
    check: Callable[[], None] = lambda: None,
    batch_size: int = 0,
) -> Embeddings:
    """Embed all pairs with dropout off. Each process embeds its share, and all get everything.

    ``batch_size`` pairs pass through the towers together; 0 chooses. ``check`` is called before
    each batch, and may end the work by raising a ``ClipftError``.

    Raises:
        DataError: no pair can be used, or more than ``max_bad`` of them cannot.
        NotFiniteError: an embedding is not a number.
    """
    share, device = Share(processes.rank, processes.world_size), loaded.precision.device
    options = LoaderOptions.from_settings(settings, device, share, processes.local_world_size)
    batch_size = batch_size or evaluation_batch(settings, device)
    batches = evaluation_batches(pairs, how.preprocessing, batch_size, options)
    own = _embed_share(loaded, how, in_lockstep(processes, batches, check), positives)
    skipped = tuple(chain.from_iterable(processes.gather_objects(own.skipped)))
    numbers = tuple(chain.from_iterable(processes.gather_objects(own.numbers)))
    first = ""
    if skipped:
        first = f": first {skipped[0].key} in {skipped[0].shard} ({skipped[0].reason})"
    if not numbers:
        raise DataError(
            f"none of the {counted(len(skipped), 'pair')} can be used{first}",
            "run `clipft inspect` to see what is broken",
        )
    groups = None if own.groups is None else processes.gather_rows(own.groups)
    images, texts = processes.gather_rows(own.images), processes.gather_rows(own.texts)
    for what, rows in (("image", images), ("caption", texts)):
        check_finite_rows(rows, partial(_name_of, pairs, numbers, what))
    # Equal captions in different batches differ by rounding, which would break ties between
    # them: they all get the embedding of the first
    captions = processes.gather_rows(own.captions).numpy()
    _, firsts, which = np.unique(captions, return_index=True, return_inverse=True)
    texts = texts[torch.from_numpy(firsts[which])]
    if settings.too_many_bad(len(skipped), len(pairs)):
        raise DataError(
            f"{len(skipped)} of {len(pairs)} validation pairs could not be used, more than "
            f"--max-bad {settings.max_bad:g}{first}",
            "run `clipft inspect` to see what is broken; fix it, or raise --max-bad",
        )
    return Embeddings(images, texts, numbers, skipped, groups)


def _name_of(pairs: PairSource, numbers: Sequence[int], what: str, row: int) -> str:
    pair = (pairs.pairs if isinstance(pairs, ChosenPairs) else pairs)[numbers[row]]
    return f"the {what} of {pair.key} in {pair.shard}"


@torch.inference_mode()
def _embed_share(
    loaded: LoadedModel, how: Encoding, batches: Iterable[Batch], positives: Positives
) -> _Share:
    was_training = loaded.model.training
    loaded.model.eval()
    # Start with empty tensors, so that a process without any pairs can concatenate as well
    images, texts = [torch.empty(0)], [torch.empty(0)]
    captions = [torch.empty(0, dtype=torch.int64)]
    groups = [] if (none := positives.ids(EMPTY_BATCH)) is None else [none]
    numbers, skipped = list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        numbers += batch.numbers
        images.append(_encode(how.towers.images, batch)[0])
        rows, keys = _encode(how.towers.texts, batch)
        texts.append(rows)
        captions.append(keys)
        ids = positives.ids(batch)
        groups += [] if ids is None else [ids]
    loaded.model.train(was_training)
    return _Share(
        torch.cat(images),
        torch.cat(texts),
        tuple(numbers),
        tuple(skipped),
        torch.cat(groups) if groups else None,
        torch.cat(captions),
    )


def _encode(tower: Tower, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the embeddings [B, D] of a batch and the keys of its inputs, int64 [B]."""
    made = tower.make_chunks([batch] if len(batch) else [])
    rows = [tower.encode(0, chunk) for chunk in made.chunks]
    if not rows:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    own_keys = [chunk.keys[: chunk.rows] for chunk in made.chunks]
    keys = torch.from_numpy(np.concatenate(own_keys).astype(np.int64))
    return torch.cat(rows).cpu()[made.order], keys[made.order]


@torch.inference_mode()
def embed_texts(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Embed any texts into float32 [len(texts), D] of unit length, on the CPU.

    Raises:
        NotFiniteError: an embedding is not a number.
    """
    inputs, precision = loaded.base.inputs, loaded.precision
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    ids = padded([encoded.ids for encoded in encoder(texts)], encoder.eos_token_id)
    with precision.autocast():
        rows = loaded.model.eval().encode_texts(ids.to(precision.device)).cpu()
    check_finite_rows(rows, lambda row: f"the text {texts[row]!r}")
    return rows
