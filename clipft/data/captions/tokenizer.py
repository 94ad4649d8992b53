"""Turns captions into token ids, cleaned and truncated to the model's context length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipft.core.hashing import INCREMENT, Words, mix64
from clipft.data.captions.cleaning import clean_like_clip, clip_rule

_GIVEN_UP = 16
"""At most this many tokens of the context stay unused so that a truncated caption ends with a whole
word. Longer words, and sentences without spaces, are cut in the middle."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized text: ``ids`` with the start and end tokens, and the ``length`` that they would
    have had without truncation."""

    ids: list[int]
    length: int


class CaptionEncoder:
    """Tokenizes captions with a tokenizer of transformers, as the text towers expect them.

    ``context`` is the greatest number of ids, the start and end tokens included. CLIP's and
    SigLIP 2's tokenizers are used through the Rust library that they wrap, which is faster;
    SigLIP's is a SentencePiece tokenizer written in Python.

    Texts for CLIP's tokenizer are cleaned as in CLIP's training (``clean_like_clip``). In texts for
    other families of models, only runs of white space become single spaces. The names of special
    tokens are plain text: ``<|endoftext|>`` in a caption does not end it.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.context = context
        self.eos_token_id = int(tokenizer.eos_token_id)
        self._tokenizer, self._rust = tokenizer, getattr(tokenizer, "backend_tokenizer", None)
        if self._rust:
            self._rust.no_truncation()
            self._rust.no_padding()
            self._rust.encode_special_tokens = True
        # Only CLIP's byte-pair tokenizer ends words in </w>
        suffix = getattr(getattr(self._rust, "model", None), "end_of_word_suffix", None)
        self._like_clip = suffix == "</w>"

    @property
    def vocabulary(self) -> str:
        """Everything that the ids depend on, as text, for the key of the cache."""
        rule = clip_rule() if self._like_clip else "spaces"
        if self._rust:
            return f"{self.context} {rule} {self._rust.to_str()}"
        pieces = sorted(self._tokenizer.get_vocab().items())
        name, lower = type(self._tokenizer).__name__, self._tokenizer.do_lower_case
        return f"{self.context} {rule} {name} {lower} {pieces}"

    def clean(self, text: str) -> str:
        """Return the text as the model reads it."""
        return clean_like_clip(text) if self._like_clip else " ".join(text.split())

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        cleaned = [self.clean(text) for text in texts]
        if self._rust:
            all_ids = [encoding.ids for encoding in self._rust.encode_batch_fast(cleaned)]
        else:
            options = {"padding": False, "truncation": False, "verbose": False}
            options["split_special_tokens"] = True
            all_ids = self._tokenizer(cleaned, **options)["input_ids"]
        return [
            Encoded(ids if len(ids) <= self.context else self._truncate(text, ids), len(ids))
            for text, ids in zip(cleaned, all_ids, strict=True)
        ]

    def _truncate(self, text: str, ids: list[int]) -> list[int]:
        """Keep the words that fit, and the end token.

        If too many tokens would stay unused, the next word is cut between two of its characters.
        """
        words: Sequence[int | None]  # for each id the number of its word; None for start and end
        characters: Sequence[int]  # for each id where its first character is in the text
        if self._rust:
            encoding = self._rust.encode(text)
            words, characters = encoding.word_ids, [start for start, _ in encoding.offsets]
        else:
            # SentencePiece marks the piece that begins a word with a visible space
            pieces = self._tokenizer.convert_ids_to_tokens(ids[:-1])
            words = [*accumulate(piece.startswith("\u2581") for piece in pieces), None]
            characters = range(len(ids))
        fits = kept = self.context - 1
        while kept > 1 and words[kept] == words[kept - 1]:
            kept -= 1
        if fits - kept > _GIVEN_UP:
            kept = fits
            while kept > 1 and characters[kept] == characters[kept - 1]:
                kept -= 1
        return [*ids[: kept if kept > 1 else fits], self.eos_token_id]


def lost_share(lengths: Sequence[int], kept: Sequence[int]) -> float:
    """Return the share of tokens that the truncated captions lose, all of them taken together.

    ``lengths`` holds the lengths of all captions before truncation, and ``kept`` those after it.
    """
    cut = [(before, after) for before, after in zip(lengths, kept, strict=True) if after < before]
    whole = sum(before for before, _ in cut)
    return 1 - sum(after for _, after in cut) / whole if whole else 0.0


def padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Stack rows of ids to int64 [rows, T], each padded to the longest.

    CLIP's text tower is causal and pools at the first end token, so padding with that token changes
    nothing and no attention mask is needed; SigLIP's tower pads to its full length itself.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token_id] * (longest - len(row))] for row in rows])


def stacked(parts: Sequence[Tensor], pad_token_id: int, width: int = 0) -> Tensor:
    """Concatenate padded ids [b_i, T_i] to [sum of b_i, longest T_i], at least ``width`` wide."""
    longest = max(width, *(part.shape[1] for part in parts))
    wide = (functional.pad(p, (0, longest - p.shape[1]), value=pad_token_id) for p in parts)
    return torch.cat(list(wide))


def lengths(ids: Tensor, pad_token_id: int) -> Tensor:
    """Count the ids of each row of [rows, T] up to the last that is not padding: int64 [rows]."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (places * (ids != pad_token_id)).amax(1)


Keys = Words


def caption_keys(ids: Tensor, pad_token_id: int) -> Keys:
    """Hash each row of [rows, T] to a uint64 that does not depend on the padding.

    Each id is mixed with its position; the results are added up and mixed once more. Different
    captions have different keys, except for collisions of 64 bits.
    """
    values = ids.cpu().numpy().astype(np.uint64)
    places = np.arange(1, values.shape[1] + 1, dtype=np.uint64) * INCREMENT
    counted = np.arange(values.shape[1]) < lengths(ids, pad_token_id).cpu().numpy()[:, None]
    return mix64((mix64(values + places) * counted).sum(1, dtype=np.uint64))
