"""CLIP itself, and the base class of the other families."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.config.sections.model import InputSizes
from clipft.core.patches import Patches
from clipft.models.fast_encoder import encode_pooled
from clipft.models.positions import resize_images, resize_texts

CLIP_MAPS = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    **{name: f"mlp.{name}" for name in ("fc1", "fc2")},
}
"""The linear maps of an encoder layer, by their names in ``trainable.TARGETS``."""


@dataclass(frozen=True)
class ImageDefaults:
    """Image preprocessing of a family, for checkpoints whose configuration does not contain it.

    The fields mean the same as in ``ModelInputs``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool


class Architecture:
    """A family of models: where its modules are, and how its towers are run.

    This base class is CLIP itself, ``CLIPModel`` in transformers: OpenAI's checkpoints, and the
    converted ones of LAION, DataComp and MetaCLIP. Methods take ``clip``, a transformers model
    or PEFT's wrapper around one.
    """

    projections: ClassVar[Mapping[str, str]] = {
        VISUAL: "visual_projection",
        TEXTUAL: "text_projection",
    }
    """Paths of the modules that scenarios call projections."""
    layers: ClassVar[Mapping[str, str]] = {
        "vision": "vision_model.encoder.layers",
        "text": "text_model.encoder.layers",
    }
    """Paths of the encoder layers of both towers."""
    maps: ClassVar[Mapping[str, Mapping[str, str]]] = {"vision": CLIP_MAPS, "text": CLIP_MAPS}
    """Paths, in a layer of each tower, of the linear maps that may get adapters."""
    slower: ClassVar[str] = ""
    """The part that runs in transformers' code, because it does not fit the fast encoder."""
    loss: ClassVar[str] = "clip"
    """The loss that the family was pretrained with."""
    max_logit_scale: ClassVar[float] = math.log(100)
    """Upper bound of the temperature, as its natural logarithm."""
    pads_texts: ClassVar[bool] = False
    """Whether the text tower attends to padding, so that each text must fill the context."""
    model_class: ClassVar[str] = "CLIPModel"
    processor_class: ClassVar[str] = "CLIPProcessor"
    not_exported: ClassVar[Mapping[str, str]] = {}
    """The reason for each format in which the family's models cannot be exported."""
    unshardable: ClassVar[str] = ""
    """Why ``--shard-weights`` does not find the layers of both towers; empty if it does."""
    image_defaults: ClassVar[ImageDefaults] = ImageDefaults(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        squashed=False,
    )

    def embedding_size(self, clip: Any) -> int:
        """Return the number of dimensions of the shared space."""
        size: int = clip.config.projection_dim
        return size

    def read_config(self, source: str) -> Any:
        """Read the configuration of a folder or hub id."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, trust_remote_code=False)

    def load(self, source: str) -> tuple[Any, dict[str, Any]]:
        """Load a model in fp32; return it, and the names of missing and unexpected weights."""
        import transformers

        loaded: tuple[Any, dict[str, Any]] = getattr(
            transformers, self.model_class
        ).from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation="sdpa",  # ``encode_pooled`` calls the layers without a mask
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights refuses them by name
        )
        return loaded

    def context_length(self, config: Any, tokenizer: Any) -> int:
        """Return the most tokens that a text may have without ``--context-length``."""
        return int(config.text_config.max_position_embeddings)

    def patches(self, config: Any, processor: Any, image_size: int) -> Patches | None:
        """Return the patches of a family whose images keep their shape; None for the others.

        ``processor`` is the configuration of the image processor, and ``image_size`` the value of
        ``--image-size``, 0 without it.
        """
        return None

    def resize_inputs(self, clip: Any, sizes: InputSizes) -> None:
        """Give a model in fp32 another context length or image size.

        Raises:
            UsageError: the model cannot have that size.
        """
        if sizes.context_length:
            resize_texts(clip, sizes.context_length)
        if sizes.image_size:
            resize_images(clip, sizes.image_size)

    def image_positions(self, clip: Any) -> int:
        """Return the number of positions of an image in the vision tower."""
        positions: int = clip.vision_model.embeddings.position_embedding.num_embeddings
        return positions

    def lora_targets(
        self, clip: Any, towers: Sequence[str], maps: Sequence[str]
    ) -> str | list[str]:
        """Return the modules that get adapters, in the form of PEFT's ``target_modules``.

        ``towers`` are some of ``vision`` and ``text``. ``maps`` are linear maps of a layer, by
        CLIP's names.
        """
        paths = []
        for tower in towers:
            chosen = "|".join(re.escape(self.maps[tower][name]) for name in maps)
            paths.append(rf"{re.escape(self.layers[tower])}\.\d+\.({chosen})")
        return rf"(.*\.)?({'|'.join(paths)})"

    def layers_above(self, clip: Any, name: str, part: str) -> int:
        """Count the encoder layers from a parameter of ``vision`` or ``text`` to the tower's end.

        For the token and patch embeddings, the result is one more than the number of layers.
        """
        layers: int = getattr(clip.config, f"{part}_config").num_hidden_layers
        if inside := re.search(rf"{re.escape(self.layers[part])}\.(\d+)\.", name):
            return layers - int(inside.group(1))
        below = ".embeddings." in name or ".pre_layrnorm." in name
        return layers + 1 if below else 0

    def pixel_features(
        self, clip: Any, pixels: Tensor, normalize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Encode the loader's images, uint8, into features [B, W].

        ``normalize`` takes uint8 [B, 3, H, W] and returns float.
        """
        return self.image_features(clip, normalize(pixels))

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        """Encode normalized pixels, float [B, 3, S, S], into features [B, W]."""
        tower = clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        class_token = torch.zeros_like(hidden[:, 0, 0], dtype=torch.int64)
        pooled: Tensor = tower.post_layernorm(
            encode_pooled(tower, hidden, class_token, causal=False)
        )
        return pooled

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        """Encode token ids, int64 [B, T], into features [B, W]."""
        tower = clip.text_model
        hidden = tower.embeddings(input_ids=input_ids)
        end = (input_ids == clip.config.text_config.eos_token_id).int().argmax(-1)
        pooled: Tensor = tower.final_layer_norm(encode_pooled(tower, hidden, end, causal=True))
        return pooled

    def project_images(self, clip: Any, features: Tensor) -> Tensor:
        """Project image features [B, W] to [B, D]."""
        projected: Tensor = clip.visual_projection(features)
        return projected

    def project_texts(self, clip: Any, features: Tensor) -> Tensor:
        """Project text features [B, W] to [B, D]."""
        projected: Tensor = clip.text_projection(features)
        return projected


class MetaClip2(Architecture):
    """``transformers.MetaClip2Model``, which has CLIP's modules and a multilingual tokenizer."""

    model_class = "MetaClip2Model"


def is_padding(input_ids: Tensor, end: int) -> Tensor:
    """Mark the tokens after the first end token of each text: int64 [B, T] -> bool [B, T]."""
    ends = (input_ids == end).long()
    return ends.cumsum(1) - ends > 0
