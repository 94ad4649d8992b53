"""Text -> token ids, at most as many as the model takes, cut between words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """``ids`` with start and end; ``length`` is what the whole text would have taken."""

    ids: list[int]
    length: int


class CaptionEncoder:
    """A tokenizer of transformers, as CLIP's text tower wants it.

    ``context`` is the greatest number of ids, start and end included.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.context = context
        self.end = int(tokenizer.eos_token_id)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def vocabulary(self) -> str:
        """All that decides the ids, as text."""
        return f"{self.context} {self._backend.to_str()}"

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        whole = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]
        return [
            Encoded(ids if len(ids) <= self.context else self._cut(text), len(ids))
            for text, ids in zip(texts, whole, strict=True)
        ]

    def _cut(self, text: str) -> list[int]:
        """The words that fit, and the end; a single word that is longer is cut inside."""
        encoding = self._backend.encode(text)
        words, fits = encoding.word_ids, self.context - 1
        kept = fits
        while kept > 1 and words[kept] == words[kept - 1]:
            kept -= 1
        return [*encoding.ids[: kept if kept > 1 else fits], self.end]


def padded(rows: Sequence[Sequence[int]], end: int) -> Tensor:
    """int64 [rows, T], filled to the longest with ``end``.

    The text tower is causal and pools at the first end, so what follows it changes nothing
    and no attention mask is needed.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows])


Keys = np.ndarray[Any, np.dtype[np.uint64]]

_PLACE, _ODD, _MIX = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def lengths(ids: Tensor, fill: int) -> Tensor:
    """int64 [rows]: the ids of each row of [rows, T] up to the last that is no ``fill``."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (places * (ids != fill)).amax(1)


def caption_keys(ids: Tensor, fill: int) -> Keys:
    """uint64 [rows]: equal for equal captions however far they are filled, and, by 64 bits,
    for no others. SplitMix64 (Steele et al. 2014) of each id and place, added up."""
    values = ids.cpu().numpy().astype(np.uint64)
    places = np.arange(1, values.shape[1] + 1, dtype=np.uint64) * _PLACE
    counted = np.arange(values.shape[1]) < lengths(ids, fill).cpu().numpy()[:, None]
    return _mixed((_mixed(values + places) * counted).sum(1, dtype=np.uint64))


def _mixed(values: Keys) -> Keys:
    values = (values ^ (values >> np.uint64(30))) * _ODD
    values = (values ^ (values >> np.uint64(27))) * _MIX
    return values ^ (values >> np.uint64(31))
