"""Provides the two towers as functions of one tensor, and compares a runtime with them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.models.architectures import Architecture
from clipft.models.pretrained import ModelInputs, PretrainedModel

TOWERS = ("images", "texts")
Encoder = Callable[[Tensor], Tensor]
"""Maps pixels float32 [B, 3, S, S] or token ids int64 [B, T] to unit embeddings float32 [B, D]."""


class _Tower(nn.Module):
    """A tower with its projection. It returns unit embeddings, float32 [batch, D]."""

    def __init__(self, clip: Any, architecture: Architecture) -> None:
        super().__init__()
        self.clip, self.architecture = clip, architecture


class ImageTower(_Tower):
    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.architecture.image_features(self.clip, pixel_values)
        return functional.normalize(self.architecture.project_images(self.clip, features), dim=-1)


class TextTower(_Tower):
    def forward(self, input_ids: Tensor) -> Tensor:
        features = self.architecture.text_features(self.clip, input_ids)
        return functional.normalize(self.architecture.project_texts(self.clip, features), dim=-1)


def towers_of(clip: Any, base: PretrainedModel) -> dict[str, nn.Module]:
    """Return both towers of a merged model, in eval mode, by their names in ``TOWERS``."""
    images, texts = ImageTower(clip, base.architecture), TextTower(clip, base.architecture)
    return {"images": images.eval(), "texts": texts.eval()}


@contextmanager
def plain_attention() -> Iterator[None]:
    """Make ``nn.MultiheadAttention``, which SigLIP uses for pooling, run as plain operations, which
    every converter supports."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class TowerInputs:
    """Inputs for both towers: ``pixel_values`` uint8 [B, 3, S, S], ``input_ids`` int64 [B, T]."""

    pixel_values: Tensor
    input_ids: Tensor

    def by_tower(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Return the input of each tower. Pixels are normalized to float32."""
        return {"images": normalized(inputs, self.pixel_values), "texts": self.input_ids}


@dataclass(frozen=True)
class TowerCheck:
    """The largest difference of a component of an embedding between a runtime and torch.

    ``checked_with`` is the program that ran the runtime's towers, on ``pairs`` pairs.
    """

    pairs: int
    image_difference: float
    text_difference: float
    checked_with: str

    @property
    def worst(self) -> float:
        return max(self.image_difference, self.text_difference)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def normalized(inputs: ModelInputs, pixels: Tensor) -> Tensor:
    """Normalize uint8 pixels [B, 3, S, S] for the image tower, to float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (inputs.mean, inputs.std))
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def compare_towers(
    encoders: dict[str, Encoder],
    clip: Any,
    base: PretrainedModel,
    batches: Iterable[TowerInputs],
    checked_with: str,
) -> TowerCheck:
    """Compare the encoders of a runtime, run by ``checked_with``, with torch on the same inputs."""
    towers, worst, pairs = towers_of(clip, base), dict.fromkeys(TOWERS, 0.0), 0
    for batch in batches:
        pairs += len(batch.pixel_values)
        for kind, inputs in batch.by_tower(base.inputs).items():
            differences = (encoders[kind](inputs) - towers[kind](inputs)).abs()
            # max would ignore a NaN
            largest = float(differences.nan_to_num(nan=torch.inf).max())
            worst[kind] = max(worst[kind], largest)
    return TowerCheck(pairs, worst["images"], worst["texts"], checked_with)


def made_up_inputs(inputs: ModelInputs) -> list[TowerInputs]:
    """Make random pixels and texts, in batches of several sizes and texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    special = set(inputs.tokenizer.all_special_ids)
    words = torch.tensor([i for i in range(len(inputs.tokenizer)) if i not in special])
    end = int(inputs.tokenizer.eos_token_id)
    batches = []
    for rows, length in ((1, 3), (3, 16), (2, inputs.context_length)):
        shape = (rows, 3, inputs.image_size, inputs.image_size)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        ids = words[torch.randint(len(words), (rows, length), generator=generator)]
        ids[:, 0] = int(inputs.tokenizer.bos_token_id or ids[0, 0])
        ids[:, -1] = end
        ids[0, length // 2 + 1 :] = end  # a padded row
        batches.append(TowerInputs(pixels, ids))
    return batches
