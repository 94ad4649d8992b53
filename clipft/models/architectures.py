"""The families of CLIP: where each keeps its projections, and how its towers pool.

A tower turns pictures or texts into pooled features; its projection turns these into the
shared space. Splitting there lets features of a tower that does not train be kept.

CLIP's projections are its two bias-free linear maps. SigLIP has none by that name; what
follows its pooling takes their place: the MLP of the attention pool, with its norm and its
residual, for pictures; the linear head for texts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.models.fast_encoder import encode_pooled


@dataclass(frozen=True)
class PictureDefaults:
    """``mean`` and ``std`` normalise pixels in 0..1, per channel; ``squashed`` pictures are
    brought to the square whole, whatever their shape, others are cropped to it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool


class Architecture(Protocol):
    """Takes ``clip``, transformers' model or PEFT's wrapping of it, apart."""

    @property
    def projections(self) -> Mapping[str, str]:
        """Where the modules that scenarios call projections lie."""

    @property
    def loss(self) -> str:
        """The loss that such checkpoints were made with."""

    @property
    def max_logit_scale(self) -> float:
        """What the temperature, as its logarithm, is kept at or below."""

    @property
    def fills_texts(self) -> bool:
        """The text tower looks at all places, and takes the same time for any text."""

    @property
    def model_class(self) -> str:
        """Its name in transformers."""

    @property
    def processor_class(self) -> str:
        """Likewise, of texts and pictures at once."""

    @property
    def picture(self) -> "PictureDefaults":
        """Where a checkpoint's own preprocessing leaves something out."""

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        """float [B, 3, S, S], normalised -> [B, W], before the projection."""

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        """int64 [B, T] -> [B, W], before the projection."""

    def project_images(self, clip: Any, features: Tensor) -> Tensor:
        """[B, W] -> [B, D]."""

    def project_texts(self, clip: Any, features: Tensor) -> Tensor:
        """[B, W] -> [B, D]."""


@dataclass(frozen=True)
class Clip:
    """``transformers.CLIPModel``: OpenAI's, and conversions of LAION's, DataComp's, MetaCLIP's."""

    projections: Mapping[str, str] = field(
        default_factory=lambda: {VISUAL: "visual_projection", TEXTUAL: "text_projection"}
    )
    loss: str = "clip"
    max_logit_scale: float = math.log(100)
    fills_texts: bool = False
    model_class: str = "CLIPModel"
    processor_class: str = "CLIPProcessor"
    picture: PictureDefaults = field(
        default_factory=lambda: PictureDefaults(
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            squashed=False,
        )
    )

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        tower = clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        first = torch.zeros_like(hidden[:, 0, 0], dtype=torch.int64)
        pooled: Tensor = tower.post_layernorm(encode_pooled(tower, hidden, first, causal=False))
        return pooled

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower = clip.text_model
        hidden = tower.embeddings(input_ids=input_ids)
        end = (input_ids == clip.config.text_config.eos_token_id).int().argmax(-1)
        pooled: Tensor = tower.final_layer_norm(encode_pooled(tower, hidden, end, causal=True))
        return pooled

    def project_images(self, clip: Any, features: Tensor) -> Tensor:
        projected: Tensor = clip.visual_projection(features)
        return projected

    def project_texts(self, clip: Any, features: Tensor) -> Tensor:
        projected: Tensor = clip.text_projection(features)
        return projected


@dataclass(frozen=True)
class Siglip:
    """``transformers.SiglipModel``: SigLIP, and SigLIP 2 at a fixed resolution."""

    projections: Mapping[str, str] = field(
        default_factory=lambda: {VISUAL: "vision_model.head.mlp", TEXTUAL: "text_model.head"}
    )
    loss: str = "siglip"
    max_logit_scale: float = math.inf  # its checkpoints begin above 100
    fills_texts: bool = True
    model_class: str = "SiglipModel"
    processor_class: str = "SiglipProcessor"
    picture: PictureDefaults = field(
        default_factory=lambda: PictureDefaults(mean=(0.5,) * 3, std=(0.5,) * 3, squashed=True)
    )

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        tower = clip.vision_model
        encoded = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        patches = tower.post_layernorm(encoded)
        # Not len(): exporters would take this batch's for the only one
        probe = tower.head.probe.expand(patches.shape[0], -1, -1)
        pooled: Tensor = tower.head.attention(probe, patches, patches, need_weights=False)[0][:, 0]
        return pooled

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower = clip.text_model
        embedded = tower.embeddings(input_ids=_filled(input_ids, clip.config.text_config))
        encoded = tower.encoder(inputs_embeds=embedded).last_hidden_state
        pooled: Tensor = tower.final_layer_norm(encoded[:, -1])
        return pooled

    def project_images(self, clip: Any, features: Tensor) -> Tensor:
        head = clip.vision_model.head
        projected: Tensor = features + head.mlp(head.layernorm(features))
        return projected

    def project_texts(self, clip: Any, features: Tensor) -> Tensor:
        projected: Tensor = clip.text_model.head(features)
        return projected


def _filled(input_ids: Tensor, config: Any) -> Tensor:
    """int64 [B, T] -> [B, context]: SigLIP's text tower looks at all places, and was trained
    with each text's end followed by padding up to the last."""
    ends = (input_ids == config.eos_token_id).long()
    behind = ends.cumsum(1) - ends > 0
    room = config.max_position_embeddings - input_ids.shape[1]
    padding: int = config.pad_token_id
    return functional.pad(input_ids.masked_fill(behind, padding), (0, room), value=padding)


ARCHITECTURES: dict[str, Architecture] = {"clip": Clip(), "siglip": Siglip()}
"""By the ``model_type`` of a checkpoint's configuration."""
