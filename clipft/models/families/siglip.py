"""SigLIP, which was trained with a sigmoid loss, and pools images by attention.

SigLIP has no modules that are called projections. The modules after its pooling take their place:
for images the MLP of the attention pool, with its norm and its residual; for texts the linear head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.config.sections.model import InputSizes
from clipft.core.patches import Patches
from clipft.models.families.clip import Architecture, ImageDefaults, is_padding
from clipft.models.positions import whole_patches

_MOST_PATCHES = 256
"""The limit if the image processor does not contain one."""


class Siglip(Architecture):
    """``transformers.SiglipModel``: SigLIP, and SigLIP 2 at a fixed resolution."""

    projections = {VISUAL: "vision_model.head.mlp", TEXTUAL: "text_model.head"}  # noqa: RUF012
    slower = "its towers run"
    loss = "siglip"
    max_logit_scale = math.inf  # its checkpoints start above 100
    pads_texts = True
    model_class = "SiglipModel"
    processor_class = "SiglipProcessor"
    image_defaults = ImageDefaults(mean=(0.5,) * 3, std=(0.5,) * 3, squashed=True)

    def embedding_size(self, clip: Any) -> int:
        size: int = clip.config.text_config.projection_size
        return size

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        tower = clip.vision_model
        encoded = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        return pooled_by_attention(tower, encoded)

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower, config = clip.text_model, clip.config.text_config
        # The tower was trained on texts that were padded to the full context
        padding: int = config.pad_token_id
        missing = config.max_position_embeddings - input_ids.shape[1]
        whole = input_ids.masked_fill(is_padding(input_ids, config.eos_token_id), padding)
        padded = functional.pad(whole, (0, missing), value=padding)
        encoded = tower.encoder(inputs_embeds=tower.embeddings(input_ids=padded)).last_hidden_state
        pooled: Tensor = tower.final_layer_norm(encoded[:, -1])
        return pooled

    def project_images(self, clip: Any, features: Tensor) -> Tensor:
        head = clip.vision_model.head
        projected: Tensor = features + head.mlp(head.layernorm(features))
        return projected

    def project_texts(self, clip: Any, features: Tensor) -> Tensor:
        projected: Tensor = clip.text_model.head(features)
        return projected


class NaFlex(Siglip):
    """``transformers.Siglip2Model``: SigLIP 2 NaFlex, whose images keep their shape.

    The rows and columns of patches depend on the shape of the image, and the grid of position
    embeddings is resampled to them. Each image is padded to the greatest number of patches, and
    nothing attends to the padding.
    """

    model_class = "Siglip2Model"
    processor_class = "Siglip2Processor"
    not_exported = {  # noqa: RUF012
        "onnx": "the positions of its patches are resampled for each image",
        "open_clip": "open_clip has no model like this one: its images keep their shape",
    }
    unshardable = "its positions are resampled for each image"

    def patches(self, config: Any, processor: Any, image_size: int) -> Patches:
        size = int(config.vision_config.patch_size)
        if not image_size:
            return Patches(size, int(processor.get("max_num_patches", _MOST_PATCHES)))
        side = whole_patches(image_size, size)
        return Patches(size, side * side)

    def resize_inputs(self, clip: Any, sizes: InputSizes) -> None:
        # Its position embeddings fit any number of patches
        super().resize_inputs(clip, InputSizes(sizes.context_length, 0))

    def pixel_features(
        self, clip: Any, pixels: Tensor, normalize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        tower, size = clip.vision_model, int(clip.config.vision_config.patch_size)
        # See Patches.shape for how an image is stored
        high, low = pixels[:, :2, 0, :2].long().unbind(1)
        grids = high * 256 + low  # [B, 2]: rows and columns
        split = normalize(pixels[..., size:]).reshape(len(pixels), 3, size, -1, size)
        values = split.permute(0, 3, 2, 4, 1).flatten(2)  # [B, P, size * size * 3]
        padding = torch.arange(values.shape[1], device=pixels.device) >= grids.prod(1)[:, None]
        hidden = tower.embeddings(values, grids)
        mask = ~padding[:, None, None]
        encoded = tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return pooled_by_attention(tower, encoded, padding)


def pooled_by_attention(tower: Any, encoded: Tensor, padding: Tensor | None = None) -> Tensor:
    """Pool patches [B, P, W] to [B, W] by attention. Patches where ``padding``, bool [B, P], is
    true are ignored."""
    patches = tower.post_layernorm(encoded)
    # Not len(): ONNX export would fix the batch size to this batch's
    probe = tower.head.probe.expand(patches.shape[0], -1, -1)
    pooled: Tensor = tower.head.attention(
        probe, patches, patches, key_padding_mask=padding, need_weights=False
    )[0][:, 0]
    return pooled
