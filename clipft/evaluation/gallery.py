"""What the report's gallery needs of a model, kept by the run while it has the embeddings:
for some queries the first pictures and the place of the first right one.

Right are all pictures of the query's caption, not its own pair's alone.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipft.data.captions.table import CaptionTable
from clipft.data.shards.dataset import PairDataset
from clipft.core.files import write_text
from clipft.embedding.embed import Embeddings

SHOWN = 5
_QUERIES = 1000
_BLOCK = 64
"""Queries compared at once: bounds the memory to a block times the candidates."""


@dataclass(frozen=True)
class Rankings:
    """By query: its pair's number, the rank of its first right picture (from 1), and the
    pairs' numbers of the first ``SHOWN`` pictures. ``data`` is the ``data_name`` of the pairs."""

    data: str
    queries: list[int]
    ranks: list[int]
    first: list[list[int]]

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Rankings | None":
        """None: there is no such file, or not one of ours."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Ranker:
    """Of one data set. ``groups``, int64 [pairs]: equal numbers for equal captions."""

    groups: Tensor
    data: str

    @classmethod
    def of(cls, pairs: PairDataset, captions: CaptionTable) -> "Ranker":
        known: dict[bytes, int] = {}
        groups = [
            known.setdefault(found[0] if found else b"", number)
            for number, found in enumerate(captions.by_pair())
        ]
        return cls(torch.tensor(groups, dtype=torch.int64), data_name(pairs))

    @torch.inference_mode()
    def __call__(self, embedded: Embeddings) -> Rankings:
        """Of each caption the first pair asks, of more than ``_QUERIES`` captions evenly
        spread ones. Equal scores: a right picture stands behind the others."""
        texts, images = embedded.texts, embedded.images
        pairs = torch.tensor(embedded.numbers)
        group = self.groups[pairs]
        asked = _firsts(group)
        asked = asked[:: max(1, -(-len(asked) // _QUERIES))]
        ranks, first = list[int](), list[list[int]]()
        for start in range(0, len(asked), _BLOCK):
            block = asked[start : start + _BLOCK]
            scores = texts[block] @ images.T
            right = group[None] == group[block, None]
            best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            ranks += (((scores >= best) & ~right).sum(1) + 1).tolist()
            found = scores.topk(min(SHOWN, len(images)), dim=1).indices
            first += pairs[found].tolist()
        return Rankings(self.data, pairs[asked].tolist(), ranks, first)


def data_name(pairs: PairDataset) -> str:
    """Short, and equal for equal pairs."""
    return hashlib.sha256(pairs.identity().encode()).hexdigest()[:16]


def _firsts(group: Tensor) -> Tensor:
    """Where each group comes first, in order."""
    _, which = torch.unique(group, return_inverse=True)
    places = torch.full((int(which.max()) + 1,), len(group))
    places = places.scatter_reduce(0, which, torch.arange(len(group)), "amin")
    return places.sort().values
