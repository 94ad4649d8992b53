"""Augmentations: an upright RGB image -> uint8 tensor [3, size, size].

Hue is left alone in ``simple``: in a catalogue the colour is part of the caption.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clipft.data.images import centre_crop, resize_shorter

Transform = Callable[[Image.Image], Tensor]

_PADDING = 1 / 14
"""Of the side: 16 pixels at 224."""
_CLIP_GREY = (122, 117, 104)
"""Erased areas take CLIP's mean colour, which normalises to about 0."""


def make_transform(augmentation: str, size: int) -> Transform:
    """The transform of one setting; random ones draw from torch's global generator."""
    return {"none": _none, "simple": _simple, "advanced": _advanced}[augmentation](size)


def _none(size: int) -> Transform:
    return lambda image: _to_tensor(centre_crop(resize_shorter(image, size), size))


def _simple(size: int) -> Transform:
    pad = max(1, round(size * _PADDING))
    rest = v2.Compose(
        [v2.RandomCrop(size, padding=pad, padding_mode="edge"), v2.RandomHorizontalFlip()]
    )
    return lambda image: rest(_to_tensor(resize_shorter(image, size)))


def _advanced(size: int) -> Transform:
    rest = v2.Compose(
        [
            v2.RandomCrop(size),
            v2.TrivialAugmentWide(),
            v2.RandomErasing(p=0.2, value=list(_CLIP_GREY)),
        ]
    )
    return lambda image: rest(_to_tensor(resize_shorter(image, size)))


def _to_tensor(image: Image.Image) -> Tensor:
    # bytearray: torch wants memory that it may write to
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
