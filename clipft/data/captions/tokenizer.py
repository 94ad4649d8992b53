"""Text -> token ids, at most as many as the model takes, cut between words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Encoded:
    """``ids`` with start and end; ``length`` is what the whole text would have taken."""

    ids: list[int]
    length: int


class CaptionEncoder:
    """A tokenizer of transformers, as the text towers want it.

    ``context`` is the greatest number of ids, start and end included.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.context = context
        self.eos_token_id = int(tokenizer.eos_token_id)
        fast = hasattr(tokenizer, "backend_tokenizer")
        self._backend: _Backend = _Tokenizers(tokenizer) if fast else _SentencePiece(tokenizer)

    @property
    def vocabulary(self) -> str:
        """All that decides the ids, as text."""
        return f"{self.context} {self._backend.state()}"

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        whole = self._backend.encode(list(texts))
        return [
            Encoded(ids if len(ids) <= self.context else self._cut(text, ids), len(ids))
            for text, ids in zip(texts, whole, strict=True)
        ]

    def _cut(self, text: str, ids: list[int]) -> list[int]:
        """The words that fit, and the end; a single word that is longer is cut inside."""
        words, fits = self._backend.words(text, ids), self.context - 1
        kept = fits
        while kept > 1 and words[kept] == words[kept - 1]:
            kept -= 1
        return [*ids[: kept if kept > 1 else fits], self.eos_token_id]


class _Backend(Protocol):
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids with start and end, of any length."""

    def words(self, text: str, ids: list[int]) -> Sequence[int | None]:
        """For each id of a text the number of its word; None for start and end."""

    def state(self) -> str:
        """All that decides the ids, as text."""


class _Tokenizers:
    """The Rust library: CLIP, SigLIP 2."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def words(self, text: str, ids: list[int]) -> Sequence[int | None]:
        words: list[int | None] = self._backend.encode(text).word_ids
        return words

    def state(self) -> str:
        return str(self._backend.to_str())


class _SentencePiece:
    """SigLIP, whose words begin with the piece that has the mark of a space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, padding=False, truncation=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def words(self, text: str, ids: list[int]) -> Sequence[int | None]:
        begins = [piece.startswith("\u2581") for piece in self._pieces(ids[:-1])]
        return [*accumulate(begins), None]

    def _pieces(self, ids: list[int]) -> list[str]:
        pieces: list[str] = self._tokenizer.convert_ids_to_tokens(ids)
        return pieces

    def state(self) -> str:
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return f"{type(self._tokenizer).__name__} {self._tokenizer.do_lower_case} {vocabulary}"


def padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """int64 [rows, T], filled to the longest with ``pad_token_id``.

    CLIP's text tower is causal and pools at the first end, so what follows it changes nothing
    and no attention mask is needed; SigLIP's fills texts itself.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token_id] * (longest - len(row))] for row in rows])


def stacked(parts: Sequence[Tensor], pad_token_id: int, width: int = 0) -> Tensor:
    """Rows of [b_i, T_i] under each other: [sum b_i, the longest T_i, and at least ``width``]."""
    longest = max(width, *(part.shape[1] for part in parts))
    wide = (functional.pad(p, (0, longest - p.shape[1]), value=pad_token_id) for p in parts)
    return torch.cat(list(wide))


Keys = np.ndarray[Any, np.dtype[np.uint64]]

_PLACE, _ODD, _MIX = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def lengths(ids: Tensor, pad_token_id: int) -> Tensor:
    """int64 [rows]: the ids of each row of [rows, T] up to the last that is no ``pad_token_id``."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (places * (ids != pad_token_id)).amax(1)


def caption_keys(ids: Tensor, pad_token_id: int) -> Keys:
    """uint64 [rows]: equal for equal captions however far they are filled, and, by 64 bits,
    for no others. SplitMix64 (Steele et al. 2014) of each id and place, added up."""
    values = ids.cpu().numpy().astype(np.uint64)
    places = np.arange(1, values.shape[1] + 1, dtype=np.uint64) * _PLACE
    counted = np.arange(values.shape[1]) < lengths(ids, pad_token_id).cpu().numpy()[:, None]
    return _mixed((_mixed(values + places) * counted).sum(1, dtype=np.uint64))


def _mixed(values: Keys) -> Keys:
    values = (values ^ (values >> np.uint64(30))) * _ODD
    values = (values ^ (values >> np.uint64(27))) * _MIX
    return values ^ (values >> np.uint64(31))
