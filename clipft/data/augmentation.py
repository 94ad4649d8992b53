"""Augmentations: an upright RGB image and a seed -> uint8 tensor [3, size, size].

Resizing is bicubic and antialiased by torch's 8-bit kernel: within one step of Pillow's and
of ``CLIPImageProcessor``, at about a quarter of Pillow's time. Hue is left alone in
``simple``: in a catalogue the colour is part of the caption.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from clipft.data.images import resized_size

Transform = Callable[[Image.Image, int], Tensor]
"""(image, seed): the same seed gives the same crop, whatever was drawn before."""

_Resized = Callable[[Image.Image], Tensor]
_Indices = np.ndarray[Any, np.dtype[np.int64]]

_PADDING = 1 / 14
"""Of the side: 16 pixels at 224."""
_CLIP_GREY = (122, 117, 104)
"""Erased areas take CLIP's mean colour, which normalises to about 0."""


def make_transform(augmentation: str, size: int, squashed: bool = False) -> Transform:
    """The transform of one setting. ``squashed``: the whole picture in the square, whatever its
    shape; else its shorter side gives the size."""
    resized = partial(_squashed if squashed else _resized, side=size)
    return {"none": _none, "simple": _simple, "advanced": _advanced}[augmentation](size, resized)


def _none(size: int, resized: _Resized) -> Transform:
    def transform(image: Image.Image, seed: int) -> Tensor:
        pixels = resized(image)
        top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
        return pixels[:, top : top + size, left : left + size].contiguous()

    return transform


def _simple(size: int, resized: _Resized) -> Transform:
    """A crop from the image padded with its edges, and half of the time its mirror image."""
    pad = max(1, round(size * _PADDING))

    def transform(image: Image.Image, seed: int) -> Tensor:
        pixels, draw = resized(image), np.random.default_rng(seed)
        rows = _window(pixels.shape[1], size, pad, draw)
        columns = _window(pixels.shape[2], size, pad, draw)
        if draw.random() < 0.5:
            columns = columns[::-1]
        # numpy's take: nine times as fast here as indexing a tensor
        return torch.from_numpy(pixels.numpy().take(rows, axis=1).take(columns, axis=2))

    return transform


def _window(length: int, size: int, pad: int, draw: np.random.Generator) -> _Indices:
    """``size`` indices in a row at a random place; those beyond an edge repeat it."""
    start = int(draw.integers(-pad, length + pad - size, endpoint=True))
    return np.arange(start, start + size).clip(0, length - 1)


def _advanced(size: int, resized: _Resized) -> Transform:
    rest = v2.Compose(
        [
            v2.RandomCrop(size),
            v2.TrivialAugmentWide(),
            v2.RandomErasing(p=0.2, value=list(_CLIP_GREY)),
        ]
    )

    def transform(image: Image.Image, seed: int) -> Tensor:
        pixels = resized(image)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            augmented: Tensor = rest(pixels)
        return augmented.contiguous()

    return transform


def _resized(image: Image.Image, side: int) -> Tensor:
    """Shorter side to ``side``: uint8 [3, H, W], channels last in memory."""
    return _to_size(image, resized_size(image.size, side))


def _squashed(image: Image.Image, side: int) -> Tensor:
    """Both sides to ``side``."""
    return _to_size(image, (side, side))


def _to_size(image: Image.Image, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.size == size:
        return pixels
    width, height = size
    return interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
