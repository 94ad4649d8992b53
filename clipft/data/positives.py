"""Which rows of a batch are no negatives of each other: a group id for each row.

Ids follow from the pairs alone, so they are equal in any batch, process and machine.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.data.captions.metadata import fields_hint, known_fields
from clipft.data.captions.tokenizer import caption_keys
from clipft.data.loader import Batch, Pairs
from clipft.data.shards.dataset import PairDataset

_MANY = 20_000
"""Pairs whose metadata takes a time that a user notices."""

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
    """Rows with the same caption. ``pad_token_id`` ends and pads the texts."""

    pad_token_id: int

    def ids(self, batch: Batch) -> Tensor | None:
        keys = caption_keys(batch.input_ids, self.pad_token_id)
        return torch.from_numpy((keys >> np.uint64(1)).astype(np.int64))


@dataclass(frozen=True)
class GroupPositives(Positives):
    """Rows with the same value of a metadata field; ``table`` int64 [pairs] by pair number."""

    table: Tensor

    def ids(self, batch: Batch) -> Tensor | None:
        return self.table[list(batch.numbers)]


def make_positives(
    settings: Settings, pairs: Pairs, pad_token_id: int, note: Callable[[str], None]
) -> Positives:
    """What ``settings.positives`` names, for these pairs.

    Raises:
        UsageError: groups of a stream, or by a field that no pair has.
    """
    if settings.positives == "pair":
        return NO_GROUPS
    if settings.positives == "caption":
        return CaptionPositives(pad_token_id)
    if not isinstance(pairs, PairDataset):
        raise UsageError(
            "--positives group does not go with --stream: groups are looked up by pair",
            "leave --stream out, or use --positives caption",
        )
    field = _checked(settings.group_field, pairs)
    if len(pairs) > _MANY:
        note(f"Reading {field} of {counted(len(pairs), 'pair')} ...")
    return GroupPositives(_table(field, pairs))


def _checked(field: str | None, pairs: PairDataset) -> str:
    known = known_fields(pairs)
    if not field:
        raise UsageError("--positives group needs --group-field", fields_hint("", known))
    if field not in known:
        raise UsageError(
            f"--positives group: no pair has a field {field!r}", fields_hint(field, known)
        )
    return field


def _table(name: str, pairs: PairDataset) -> Tensor:
    ids = [_id(pairs.metadata(number), name.split("."), number) for number in range(len(pairs))]
    return torch.tensor(ids, dtype=torch.int64)


def _id(metadata: object, path: list[str], number: int) -> int:
    """Of the value; a pair without one has an id of its own, which no hash is."""
    value = metadata
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    text = "" if value is None else str(value).strip()
    if not text:
        return -1 - number
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _POSITIVE
