"""Refuses embeddings with NaN or infinity, and names their pair.

Such an embedding has no similarity to anything. Pixels and token ids are always finite, so the
cause is the model: its weights are from a training that diverged, or its values overflow fp16.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipft.core.errors import ModelError

HINT = "try --precision fp32; if that changes nothing, the weights are broken: use another model"


class NotFiniteError(ModelError):
    """A model embeds an image or a text as NaN or infinity."""


def check_finite_rows(rows: Tensor, name_of: Callable[[int], str]) -> None:
    """Check that all rows of [N, D] are finite; ``name_of`` returns the name of a row's input.

    Raises:
        NotFiniteError: some rows are not finite.
    """
    broken = not_finite_rows(rows)
    if broken:
        raise NotFiniteError(describe_broken(len(broken), name_of(broken[0])), HINT)


def not_finite_rows(rows: Tensor) -> list[int]:
    """Return the rows of [N, D] that hold NaN or infinity."""
    found: list[int] = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
    return found


def describe_broken(count: int, first: str) -> str:
    others = f", and neither are {count - 1:,} others" if count > 2 else ""
    others = ", and neither is 1 other" if count == 2 else others
    return f"the embedding of {first} is not a number{others}"
