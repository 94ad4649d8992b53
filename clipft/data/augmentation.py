"""Augmentations: an upright RGB image and a seed -> uint8 tensor [3, size, size].

Resizing is bicubic and antialiased by torch's 8-bit kernel: within one step of Pillow's and of
``CLIPImageProcessor``, in about a quarter of Pillow's time. ``simple`` does not change the hue: in
a catalogue, the color is part of the caption.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from clipft.data.images import resized_size

Transform = Callable[[Image.Image, int], Tensor]
"""(image, seed) -> pixels: the same seed gives the same crop, whatever was drawn before."""

_PADDING = 1 / 14
"""Of the side: 16 pixels at 224."""
_CLIP_GRAY = (122, 117, 104)
"""CLIP's mean color for erased areas: it is normalized to about 0."""


def make_transform(augmentation: str, size: int, squashed: bool = False) -> Transform:
    """Make the transform for a value of ``--augmentation``.

    The whole image is squashed to the square if ``squashed``, as SigLIP expects it. Otherwise the
    shorter side is resized to ``size``, and the crop decides what is seen of the longer one.
    """
    random = v2.Compose(
        [
            v2.RandomCrop(size),
            v2.TrivialAugmentWide(),
            v2.RandomErasing(p=0.2, value=list(_CLIP_GRAY)),
        ]
    )

    def transform(image: Image.Image, seed: int) -> Tensor:
        pixels = resized(image, (size, size) if squashed else resized_size(image.size, size))
        if augmentation == "simple":
            return _shift_and_mirror(pixels, size, seed)
        if augmentation == "none":
            top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
            return pixels[:, top : top + size, left : left + size].contiguous()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            augmented: Tensor = random(pixels)
        return augmented.contiguous()

    return transform


def resized(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resize to (width, height): uint8 [3, H, W], channels last in memory."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.size == size:
        return pixels
    width, height = size
    return interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def _shift_and_mirror(pixels: Tensor, size: int, seed: int) -> Tensor:
    """A random crop from the image padded with its edges, mirrored half of the time."""
    pad, draw = max(1, round(size * _PADDING)), np.random.default_rng(seed)
    windows = []
    for length in pixels.shape[1:]:
        start = int(draw.integers(-pad, length + pad - size, endpoint=True))
        # Indices beyond an edge repeat it
        windows.append(np.arange(start, start + size).clip(0, length - 1))
    rows, columns = windows
    if draw.random() < 0.5:
        columns = columns[::-1]
    # numpy's take is nine times as fast here as indexing a tensor
    return torch.from_numpy(pixels.numpy().take(rows, axis=1).take(columns, axis=2))
