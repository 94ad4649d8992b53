"""Gives a model another context length or image size by resampling its position embeddings."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from clipft.config.settings import InputSizes
from clipft.core.errors import UsageError

_WELL_TRAINED = 20
"""Positions of texts that keep their embeddings. CLIP saw few captions that were longer, so these
carry most of what it learned of positions (Long-CLIP, Zhang et al. 2024, arXiv:2403.15378)."""


def resize_inputs(clip: Any, sizes: InputSizes) -> None:
    """Change a transformers CLIP or SigLIP, in fp32, to inputs of these sizes.

    Raises:
        UsageError: the image size is not a multiple of the model's patches.
    """
    if sizes.context_length:
        embeddings = clip.text_model.embeddings
        clip.config.text_config.max_position_embeddings = sizes.context_length
        _replace(embeddings, stretched(embeddings.position_embedding.weight, sizes.context_length))
    if sizes.image_size:
        if not hasattr(clip.vision_model, "embeddings"):  # a tower that open_clip runs
            raise UsageError(
                "--image-size needs an image tower of transformers", "run without --image-size"
            )
        embeddings = clip.vision_model.embeddings
        side, rest = divmod(sizes.image_size, embeddings.patch_size)
        if rest:
            raise UsageError(
                f"--image-size {sizes.image_size} is not a multiple of the model's patches of "
                f"{embeddings.patch_size} pixels",
                f"use {max(1, side) * embeddings.patch_size}",
            )
        clip.config.vision_config.image_size = embeddings.image_size = sizes.image_size
        grid = resampled_grid(embeddings.position_embedding.weight, side)
        embeddings.num_patches, embeddings.num_positions = side * side, len(grid)
        _replace(embeddings, grid)


def stretched(rows: Tensor, length: int) -> Tensor:
    """Return the position embeddings of texts, [T, W], at another length, [length, W].

    The first 20 stay as they are, and the others are interpolated linearly between the 21st and
    the last. A shorter length keeps the first ones.
    """
    if length <= len(rows):
        return rows[:length]
    kept = min(_WELL_TRAINED, len(rows) - 1)
    more = interpolate(rows[kept:].T[None], size=length - kept, mode="linear", align_corners=True)
    return torch.cat([rows[:kept], more[0].T])


def resampled_grid(rows: Tensor, side: int) -> Tensor:
    """Return the position embeddings of patches, [P, W], on a grid of ``side`` x ``side``.

    They are resampled bicubically, as ``interpolate_pos_encoding`` of transformers does. The
    embedding of CLIP's class token, which comes first, stays as it is.
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
