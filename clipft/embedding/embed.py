"""Embeds data sets and texts with a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import DataError
from clipft.data.batch import EMPTY_BATCH, Batch
from clipft.data.captions.table import CaptionTable
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.data.decoding import PairSource
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.order import Share
from clipft.data.positives import NO_GROUPS, Positives
from clipft.data.shards.dataset import ChosenPairs, PairDataset
from clipft.data.skipped import Skipped
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import in_lockstep
from clipft.embedding.encoding import Encoding, evaluation_batch
from clipft.embedding.finite import check_finite_rows
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Tower

_MOST_ROUNDS = 10
"""The most captions per pair for which a validation measures the loss. Retrieval uses all."""
_TEXTS = 64
"""The number of prompts in one pass through the text tower."""


@dataclass(frozen=True)
class Embeddings:
    """Unit embeddings of N pairs with T captions, float32 [N, D] and [T, D] on the CPU.

    ``numbers`` are the pairs' numbers in the data set; ``skipped`` pairs have no embeddings.
    Captions with equal ``groups``, int64 [T], are not negatives of each other; None if all captions
    are. ``owners``, int64 [T], is the row of each caption's image, ascending; None if each pair has
    one caption, in the row of its image.
    """

    images: Tensor
    texts: Tensor
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    groups: Tensor | None = None
    owners: Tensor | None = None

    def rounds(self) -> "Iterator[Embeddings]":
        """Yield all images with one caption each, until every caption was used.

        The captions of an image with fewer captions than others are repeated. There are at most
        ``_MOST_ROUNDS`` rounds.
        """
        if self.owners is None:
            yield self
            return
        counts = torch.bincount(self.owners, minlength=len(self.images))
        first = counts.cumsum(0) - counts
        for nth in range(min(int(counts.max()), _MOST_ROUNDS)):
            rows = first + nth % counts
            groups = None if self.groups is None else self.groups[rows]
            texts = self.texts[rows.to(self.texts.device)]
            yield replace(self, texts=texts, groups=groups, owners=None)

    def of(self, rows: Tensor) -> "Embeddings":
        """Return some of the images, int64 [Q] and ascending, with their captions."""
        if len(rows) == len(self.images):
            return self
        texts, owners = rows, None
        if self.owners is not None:
            texts = torch.isin(self.owners, rows).nonzero().flatten()
            owners = torch.searchsorted(rows, self.owners[texts])
        return replace(
            self,
            images=self.images[rows.to(self.images.device)],
            texts=self.texts[texts.to(self.texts.device)],
            numbers=tuple(self.numbers[row] for row in rows.tolist()),
            groups=None if self.groups is None else self.groups[texts],
            owners=owners,
        )

    def where_ranked(self, device: torch.device) -> "Embeddings":
        """Return the embeddings on ``device`` if it is a CUDA device, which ranks them fastest,
        otherwise on the CPU."""
        if device.type != "cuda":
            return self
        return replace(self, images=self.images.to(device), texts=self.texts.to(device))


@dataclass(frozen=True)
class _Share:
    """The embeddings of one process's share of pairs, or of captions only, without ``images``.

    ``captions``, int64 [N], is equal for equal captions; the rest is as in ``Embeddings``.
    """

    images: Tensor
    texts: Tensor
    captions: Tensor
    groups: Tensor | None
    numbers: tuple[int, ...]
    skipped: tuple[Skipped, ...]


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
    """Embed all pairs without dropout. Each process embeds its share and gets all embeddings.

    If pairs have several captions in a table, all of them are embedded.

    ``batch_size`` pairs pass through the towers together (0: chosen automatically). ``check`` is
    called before each batch and may stop the embedding by raising a ``ClipftError``.

    Raises:
        DataError: no pair can be used, or more than ``max_bad`` of them cannot.
        NotFiniteError: an embedding is not a number.
    """
    share, device = Share(processes.rank, processes.world_size), loaded.precision.device
    options = LoaderOptions.from_settings(settings, device, share, processes.local_world_size)
    batch_size = batch_size or evaluation_batch(settings, device)
    batches = evaluation_batches(pairs, how.preprocessing, batch_size, options)
    own = _embed_share(loaded, how, in_lockstep(processes, batches, check), positives)
    further = in_lockstep(processes, _further_captions(how, pairs, batch_size, share), check)
    more = _embed_share(loaded, how, further, positives, with_images=False)
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
    if settings.too_many_bad(len(skipped), len(pairs)):
        raise DataError(
            f"{len(skipped)} of {len(pairs)} validation pairs could not be used, more than "
            f"--max-bad {settings.max_bad:g}{first}",
            "run `clipft inspect` to see what is broken; fix it, or raise --max-bad",
        )
    found = Embeddings(processes.gather_rows(own.images), torch.empty(0), numbers, skipped)
    found = _with_captions(found, own, more, processes)
    of_caption = range(len(numbers)) if found.owners is None else found.owners.tolist()
    for what, rows, of_row in (
        ("image", found.images, numbers),
        ("caption", found.texts, [numbers[row] for row in of_caption]),
    ):
        check_finite_rows(rows, partial(_name_of, pairs, of_row, what))
    return found


@torch.inference_mode()
def embed_images(
    loaded: LoadedModel,
    pairs: PairDataset,
    how: Encoding,
    settings: Settings,
    processes: Processes = ALONE,
    check: Callable[[], None] = lambda: None,
    batch_size: int = 0,
) -> tuple[Tensor, tuple[int, ...]]:
    """Embed the images that can be read: float32 [N, D] of unit length on the CPU, and the N
    numbers of their pairs.

    Each process embeds its share without dropout and gets all embeddings. ``check`` and
    ``batch_size`` are as in ``embed_pairs``.

    Raises:
        DataError: a shard was changed or removed.
    """
    share, device = Share(processes.rank, processes.world_size), loaded.precision.device
    options = LoaderOptions.from_settings(settings, device, share, processes.local_world_size)
    batch_size = batch_size or evaluation_batch(settings, device)
    batches = evaluation_batches(pairs, how.preprocessing, batch_size, options)
    was_training = loaded.model.training
    loaded.model.eval()
    images, numbers = [torch.empty(0)], list[int]()
    for batch in in_lockstep(processes, batches, check):
        images.append(_encode(how.towers.images, batch)[0])
        numbers += batch.numbers
    loaded.model.train(was_training)
    together = tuple(chain.from_iterable(processes.gather_objects(numbers)))
    return processes.gather_rows(torch.cat(images)), together


def _with_captions(
    found: Embeddings, own: _Share, more: _Share, processes: Processes
) -> Embeddings:
    """Gather the captions of all processes: the first of each pair, and its further ones."""

    def gathered(first: Tensor, following: Tensor) -> Tensor:
        parts = [processes.gather_rows(rows) for rows in (first, following)]
        return torch.cat([part for part in parts if len(part)])

    texts, groups = gathered(own.texts, more.texts), None
    if own.groups is not None and more.groups is not None:
        groups = gathered(own.groups, more.groups)
    # Embeddings of equal captions in different batches differ by rounding. All get the embedding of
    # the first, so that equal captions have equal scores
    captions = gathered(own.captions, more.captions).numpy()
    _, firsts, which = np.unique(captions, return_index=True, return_inverse=True)
    texts = texts[torch.from_numpy(firsts[which])]
    further = tuple(chain.from_iterable(processes.gather_objects(more.numbers)))
    if not further:
        return replace(found, texts=texts, groups=groups)
    pairs, pair_of = np.array(found.numbers), np.array(found.numbers + further)
    rows = np.flatnonzero(np.isin(pair_of, pairs))  # captions of skipped pairs are dropped
    # Stable, so that the captions of a pair stay in their order
    rows = rows[np.argsort(pair_of[rows], kind="stable")]
    owners, chosen = np.searchsorted(pairs, pair_of[rows]), torch.from_numpy(rows)
    groups = None if groups is None else groups[chosen]
    return replace(found, texts=texts[chosen], groups=groups, owners=torch.from_numpy(owners))


def _further_captions(
    how: Encoding, pairs: PairSource, batch_size: int, share: Share
) -> Iterator[Batch]:
    """Yield this process's batches of all captions but the first of each pair.

    They have no images. Empty batches are added so that all processes have the same number.
    """
    captions = how.preprocessing.captions
    if not isinstance(captions, CaptionTable) or not isinstance(pairs, PairDataset):
        return
    further = list(captions.further(len(pairs)))
    starts = range(0, len(further), batch_size)
    own = share.of(len(starts))
    for number in own:
        some = further[starts[number] : starts[number] + batch_size]
        ids = padded([ids for _, ids in some], captions.pad_token_id)
        yield Batch(torch.empty(0), ids, tuple(pair for pair, _ in some))
    for _ in range(-(-len(starts) // share.world_size) - len(own)):
        yield EMPTY_BATCH


def _name_of(pairs: PairSource, numbers: Sequence[int], what: str, row: int) -> str:
    pair = (pairs.pairs if isinstance(pairs, ChosenPairs) else pairs)[numbers[row]]
    return f"the {what} of {pair.key} in {pair.shard}"


@torch.inference_mode()
def _embed_share(
    loaded: LoadedModel,
    how: Encoding,
    batches: Iterable[Batch],
    positives: Positives,
    with_images: bool = True,
) -> _Share:
    was_training = loaded.model.training
    loaded.model.eval()
    # Start with empty tensors, so that a process without pairs can concatenate them too
    images, texts = [torch.empty(0)], [torch.empty(0)]
    captions = [torch.empty(0, dtype=torch.int64)]
    groups = [] if (none := positives.ids(EMPTY_BATCH)) is None else [none]
    numbers, skipped = list[int](), list[Skipped]()
    for batch in batches:
        skipped += batch.skipped
        numbers += batch.numbers
        if with_images:
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
        torch.cat(captions),
        torch.cat(groups) if groups else None,
        tuple(numbers),
        tuple(skipped),
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
def embed_in_tower(loaded: LoadedModel, tower: Tower, texts: Sequence[str]) -> Tensor:
    """Embed texts with a tower of a run, whose weights may be sharded: float32 [len(texts), D].

    All processes embed the same texts. The training mode of the model does not change.

    Raises:
        NotFiniteError: an embedding is not a number.
    """
    inputs = loaded.base.inputs
    encoder = CaptionEncoder(inputs.tokenizer, inputs.context_length)
    encoded = [encoded.ids for encoded in encoder(texts)]
    was_training = loaded.model.training
    loaded.model.eval()
    rows = list[Tensor]()
    for start in range(0, len(encoded), _TEXTS):
        ids = padded(encoded[start : start + _TEXTS], encoder.eos_token_id)
        rows.append(_encode(tower, Batch(torch.empty(0), ids, tuple(range(len(ids)))))[0])
    loaded.model.train(was_training)
    found = torch.cat(rows)
    check_finite_rows(found, lambda row: f"the text {texts[row]!r}")
    return found


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
