"""Groups of rows that are positives of each other, as an id for each row of a batch.

An id depends only on the pair, so it is the same in any batch, process and machine.
"""

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.data.batch import Batch
from clipft.data.captions.fields import field_value
from clipft.data.captions.metadata import check_group_field, check_products
from clipft.data.captions.tokenizer import caption_keys
from clipft.data.loader import Pairs
from clipft.data.shards.dataset import PairDataset

_MANY = 20_000
"""Above this number of pairs, reading the metadata is slow, and the user is told."""

_POSITIVE = (1 << 63) - 1


@dataclass(frozen=True)
class Positives:
    """Assigns the rows of a batch to groups. This base class makes each pair its own group."""

    def ids(self, batch: Batch) -> Tensor | None:
        """Return int64 [B], equal for rows of one group; None if each row is its own group."""
        return None


NO_GROUPS = Positives()


@dataclass(frozen=True)
class CaptionPositives(Positives):
    """Groups rows with the same caption; ``pad_token_id`` ends and pads the texts."""

    pad_token_id: int

    def ids(self, batch: Batch) -> Tensor | None:
        keys = caption_keys(batch.input_ids, self.pad_token_id)
        return torch.from_numpy((keys >> np.uint64(1)).astype(np.int64))


@dataclass(frozen=True)
class GroupPositives(Positives):
    """Groups rows by a table of ids, int64 [pairs], indexed by the number of the pair."""

    table: Tensor

    def ids(self, batch: Batch) -> Tensor | None:
        return self.table[list(batch.numbers)]


def make_positives(
    settings: Settings, pairs: Pairs, pad_token_id: int, note: Callable[[str], None]
) -> Positives:
    """Make the positives that ``settings.positives`` names.

    Raises:
        UsageError: Groups are used with a stream, or by a field that no pair has.
    """
    if settings.positives == "pair":
        return NO_GROUPS
    if settings.positives == "caption":
        return CaptionPositives(pad_token_id)
    option = f"--positives {settings.positives}"
    if not isinstance(pairs, PairDataset):
        raise UsageError(
            f"{option} cannot be used with --stream: groups are looked up by pair",
            "remove --stream, or use --positives caption",
        )
    field = settings.label_field if settings.positives == "label" else settings.group_field
    return GroupPositives(_group_ids(option, field, pairs, note))


def product_ids(settings: Settings, pairs: Pairs, note: Callable[[str], None]) -> Tensor | None:
    """Return the product of each pair, int64 [pairs], if the run needs it.

    Returns None without ``photo_pairs`` and ``hard_negatives``, and in a scenario that trains
    nothing.

    Raises:
        UsageError: No pair has the field, or the settings do not fit together.
    """
    indexed = pairs if isinstance(pairs, PairDataset) else None
    check_products(settings, indexed)
    asked = settings.photo_pairs or settings.hard_negatives
    if not asked or not settings.declared_scenario.trains or not indexed:
        return None
    return _group_ids("--group-field", settings.group_field, indexed, note)


def _group_ids(
    option: str, field: str | None, pairs: PairDataset, note: Callable[[str], None]
) -> Tensor:
    field = check_group_field(option, field, pairs)
    if len(pairs) > _MANY:
        note(f"Reading {field} of {counted(len(pairs), 'pair')} ...")
    ids = [_group_id(pairs.metadata(number), field, number) for number in range(len(pairs))]
    return torch.tensor(ids, dtype=torch.int64)


def _group_id(metadata: dict[str, Any], field: str, number: int) -> int:
    """Hash the value of a field to a non-negative number.

    A pair without a value is its own group, with a negative id.
    """
    value = field_value(metadata, field)
    text = "" if value is None else unicodedata.normalize("NFC", str(value)).strip()
    if not text:
        return -1 - number
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _POSITIVE
