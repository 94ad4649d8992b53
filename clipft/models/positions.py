"""Gives a model another context length or image size by resampling its position embeddings."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from clipft.core.errors import UsageError

_WELL_TRAINED = 20
"""Positions of texts whose embeddings are not changed. CLIP was trained on few longer captions, so
these positions are the well-trained ones (Long-CLIP, Zhang et al. 2024, arXiv:2403.15378)."""


def resize_texts(clip: Any, length: int) -> None:
    """Change the text tower of a transformers CLIP or SigLIP, in fp32, to a context length of
    ``length`` tokens."""
    embeddings = clip.text_model.embeddings
    clip.config.text_config.max_position_embeddings = length
    _replace(embeddings, stretched(embeddings.position_embedding.weight, length))


def resize_images(clip: Any, size: int) -> None:
    """Change the image tower of a transformers CLIP or SigLIP, in fp32, to images of ``size``
    pixels.

    Raises:
        UsageError: the size is not a multiple of the model's patches.
    """
    embeddings = clip.vision_model.embeddings
    side = whole_patches(size, embeddings.patch_size)
    clip.config.vision_config.image_size = embeddings.image_size = size
    grid = resampled_grid(embeddings.position_embedding.weight, side)
    embeddings.num_patches, embeddings.num_positions = side * side, len(grid)
    _replace(embeddings, grid)


def whole_patches(size: int, patch: int) -> int:
    """Return how many patches of ``patch`` pixels a side of ``size`` pixels has.

    Raises:
        UsageError: the number of patches is not whole.
    """
    count, rest = divmod(size, patch)
    if rest:
        raise UsageError(
            f"--image-size {size} is not a multiple of the model's patches of {patch} pixels",
            f"use {max(1, count) * patch}",
        )
    return count


def stretched(rows: Tensor, length: int) -> Tensor:
    """Resize the position embeddings of texts from [T, W] to [length, W].

    For a greater length, the first 20 do not change, and the others are interpolated linearly
    between the 21st and the last. For a smaller length, the first ones are kept.
    """
    if length <= len(rows):
        return rows[:length]
    kept = min(_WELL_TRAINED, len(rows) - 1)
    more = interpolate(rows[kept:].T[None], size=length - kept, mode="linear", align_corners=True)
    return torch.cat([rows[:kept], more[0].T])


def resampled_grid(rows: Tensor, side: int) -> Tensor:
    """Resample the position embeddings of patches, [P, W], to a grid of ``side`` x ``side``.

    The resampling is bicubic, as in ``interpolate_pos_encoding`` of transformers. The embedding of
    CLIP's class token, which comes first, does not change.
    """
    before = int(len(rows) ** 0.5)
    first = rows[: len(rows) - before * before]
    grid = rows[len(first) :].T.reshape(1, -1, before, before)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid[0].flatten(1).T])


def _replace(embeddings: Any, rows: Tensor) -> None:
    made = nn.Embedding(*rows.shape)
    made.weight = nn.Parameter(rows.detach().clone())
    embeddings.position_embedding = made
    embeddings.position_ids = torch.arange(len(rows)).expand(1, -1)
