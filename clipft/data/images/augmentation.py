"""Augmentations: an upright RGB image and a seed -> uint8 pixels [3, size, size], or a strip of
patches for models whose images keep their shape.

Images are resized by torch's bicubic, antialiased 8-bit kernel. Its pixels differ by at most 1 from
those of Pillow and ``CLIPImageProcessor``, and it takes about a quarter of Pillow's time.
``simple`` does not change the hue: in a catalogue, the color is part of the caption.

A worker can leave the second half of ``simple`` to the device. It then cuts out the square and
returns a ``Shift``, which ``augment`` applies to a whole batch with the same result.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from clipft.core.patches import Patches
from clipft.data.images.decode import resized_size

Shift: TypeAlias = tuple[int, int, int]
"""How far the image moves up and to the left, in pixels, and 1 if it is then mirrored, or 0."""

_PADDING = 1 / 14
"""Of the side: 16 pixels at 224."""
_CLIP_GRAY = (122, 117, 104)
"""CLIP's mean color for erased areas: it is normalized to about 0."""


@dataclass(frozen=True)
class Transform:
    """What a value of ``--augmentation`` does to an image.

    With ``squashed``, the whole image is squashed to a square, as SigLIP expects it. Otherwise the
    shorter side is resized to ``size``, and the longer side is cropped. With ``leave_shift``, the
    shift of ``simple`` is left to ``augment``.

    With ``patches``, the image keeps its shape, up to the size of a patch, and becomes a strip as
    ``Patches`` describes it. Nothing is cropped then, and no shift is left to the device.
    """

    augmentation: str
    size: int
    squashed: bool = False
    leave_shift: bool = False
    patches: Patches | None = None

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Return the pixels. The same seed always gives the same crop."""
        shape = self.patches.shape if self.patches else (3, self.size, self.size)
        out = torch.empty(shape, dtype=torch.uint8)
        self.write(image, seed, out)
        return out

    def write(self, image: Image.Image, seed: int, out: Tensor) -> Shift | None:
        """Write the pixels to ``out``; return the shift that is left to ``augment``, if any."""
        if self.patches:
            self._write_patches(image, seed, out, self.patches)
            return None
        size = self.size
        pixels = resized(image, (size, size) if self.squashed else resized_size(image.size, size))
        # Copied by numpy: torch takes longer for transposed bytes
        if self.augmentation == "simple":
            cut, shift = _cut(pixels.numpy(), (size, size), seed)
            if self.leave_shift:
                np.copyto(out.numpy(), cut)
                return shift
            _shifted(cut, shift, out.numpy())
        elif self.augmentation == "none":
            top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
            np.copyto(out.numpy(), pixels[:, top : top + size, left : left + size].numpy())
        else:
            out.copy_(self._advanced(pixels, seed))
        return None

    def _write_patches(self, image: Image.Image, seed: int, out: Tensor, patches: Patches) -> None:
        rows, columns = patches.grid(*image.size)
        height, width = rows * patches.size, columns * patches.size
        pixels = resized(image, (width, height), "bilinear")  # as Siglip2ImageProcessor does
        if self.augmentation == "simple":
            moved = np.empty(pixels.shape, np.uint8)
            _shifted(*_cut(pixels.numpy(), (height, width), seed), moved)
            pixels = torch.from_numpy(moved)
        elif self.augmentation == "advanced":
            pixels = self._advanced(pixels, seed)
        out.zero_()
        patches.write_grid(out, rows, columns)
        split = pixels.reshape(3, rows, patches.size, columns, patches.size)
        strip = split.permute(0, 2, 1, 3, 4).flatten(2)
        out[:, :, patches.size : patches.size + strip.shape[2]] = strip

    def _advanced(self, pixels: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            changed: Tensor = self._changes(pixels)
            return changed

    @cached_property
    def _changes(self) -> v2.Compose:
        crops = [] if self.patches else [v2.RandomCrop(self.size)]
        erasing = v2.RandomErasing(p=0.2, value=list(_CLIP_GRAY))
        return v2.Compose([*crops, v2.TrivialAugmentWide(), erasing])


def resized(image: Image.Image, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize to (width, height): uint8 [3, H, W], channels last in memory."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.size == size:
        return pixels
    width, height = size
    return interpolate(pixels[None], (height, width), mode=mode, antialias=True)[0]


Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


def _cut(pixels: Pixels, size: tuple[int, int], seed: int) -> tuple[Pixels, Shift]:
    """Draw a crop from the image padded with its edges, mirrored half of the time.

    Returns the pixels [3, *size] inside the image that are nearest to the crop, and the shift from
    there to the crop.
    """
    draw, (height, width) = np.random.default_rng(seed), size
    starts, firsts = [], []
    for length, side in zip(pixels.shape[1:], size, strict=True):
        pad = max(1, round(side * _PADDING))
        starts.append(int(draw.integers(-pad, length + pad - side, endpoint=True)))
        firsts.append(min(max(starts[-1], 0), length - side))
    (top, left), (up, to_left) = firsts, np.subtract(starts, firsts).tolist()
    mirrored = int(draw.random() < 0.5)
    return pixels[:, top : top + height, left : left + width], (up, to_left, mirrored)


def _shifted(pixels: Pixels, shift: Shift, out: Pixels) -> None:
    """Do for one image what ``augment`` does for a batch: this is faster on a CPU."""
    *moves, mirrored = shift
    out = out[:, :, ::-1] if mirrored else out
    sides = list(zip(moves, out.shape[1:], strict=True))
    rows, columns = (slice(max(0, -move), side - max(0, move)) for move, side in sides)
    from_rows, from_columns = (slice(max(0, move), side - max(0, -move)) for move, side in sides)
    out[:, rows, columns] = pixels[:, from_rows, from_columns]
    out[:, : rows.start] = out[:, rows.start, None]
    out[:, rows.stop :] = out[:, rows.stop - 1, None]
    out[:, :, : columns.start] = out[:, :, columns.start, None]
    out[:, :, columns.stop :] = out[:, :, columns.stop - 1, None]


def augment(pixels: Tensor, shifts: Tensor | None) -> Tensor:
    """Shift and mirror uint8 [B, 3, S, S] by ``shifts``, int64 [B, 3], each row a ``Shift``.

    Edges are repeated beyond the image. If ``shifts`` is None, the pixels are returned as they are.
    """
    if shifts is None:
        return pixels
    size = pixels.shape[-1]
    at = torch.arange(size, device=pixels.device)
    rows, columns = ((at + shifts[:, i, None]).clamp(0, size - 1) for i in (0, 1))
    columns = torch.where(shifts[:, 2, None] > 0, columns.flip(1), columns)
    moved = pixels.gather(2, rows[:, None, :, None].expand_as(pixels))
    return moved.gather(3, columns[:, None, None, :].expand_as(pixels))
