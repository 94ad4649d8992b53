"""Bytes of a caption file -> text -> token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # packing reads captions and needs no torch
    from torch import Tensor


class BadCaption(Exception):
    """The caption holds no text; the message says why."""


def clean_caption(data: bytes) -> str:
    """Decode and tidy one caption.

    A byte-order mark, NULs and runs of white space go; bytes that are not UTF-8 become
    replacement characters. ``<|`` is broken up, so no caption can hold a special token:
    an ``<|endoftext|>`` inside would end the text for the model.

    Raises:
        BadCaption: nothing is left.
    """
    text = data.decode("utf-8-sig", errors="replace").replace("\x00", " ")
    text = " ".join(text.replace("<|", "< |").split())
    if not text:
        raise BadCaption("empty caption")
    return text


def tokenize(tokenizer: Any, captions: Sequence[str], context: int) -> "Tensor":
    """Token ids int64 [captions, T], padded to the longest, T at most ``context``.

    The text tower is causal and pools at the first end-of-text token, so padding past it
    changes nothing and no attention mask is needed.
    """
    encoded = tokenizer(
        list(captions),
        padding="longest",
        truncation=True,
        max_length=context,
        return_tensors="pt",
    )
    ids: Tensor = encoded["input_ids"]
    return ids.long()
