"""The families of CLIP: where their projections are, and how their towers pool.

A tower turns images or texts into pooled features, and its projection maps those into the
shared embedding space. Towers are split there so that the features of a frozen tower can be
computed once and cached.

CLIP's projections are its two linear maps without bias. SigLIP has no modules of that name, so
whatever follows its pooling takes their place: for images the MLP of the attention pool, with its
norm and its residual; for texts the linear head.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from clipft.config.scenarios import TEXTUAL, VISUAL
from clipft.models.fast_encoder import encode_pooled
from clipft.models.source import FAMILIES


@dataclass(frozen=True)
class ImageDefaults:
    """Image preprocessing of a family, for checkpoints whose own configuration leaves it out.

    The fields mean the same as in ``ModelInputs``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool


class Architecture:
    """A family of models, and how to take one apart.

    This base class is CLIP itself, transformers' ``CLIPModel``: OpenAI's checkpoints, and the
    converted ones of LAION, DataComp and MetaCLIP. Methods take ``clip``, a transformers model
    or PEFT's wrapper around one.
    """

    projections: ClassVar[Mapping[str, str]] = {
        VISUAL: "visual_projection",
        TEXTUAL: "text_projection",
    }
    """Paths of the modules that scenarios call projections."""
    loss: ClassVar[str] = "clip"
    """The loss that the family was pretrained with."""
    max_logit_scale: ClassVar[float] = math.log(100)
    """Upper bound of the temperature, as its natural logarithm."""
    pads_texts: ClassVar[bool] = False
    """Whether the text tower attends to padding, so that each text must fill the context."""
    model_class: ClassVar[str] = "CLIPModel"
    processor_class: ClassVar[str] = "CLIPProcessor"
    export_formats: ClassVar[frozenset[str] | None] = None
    """Formats that its models can be exported in; None for all."""
    shardable: ClassVar[bool] = True
    """Whether ``--shard-weights`` finds the layers of both towers."""
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

        return AutoConfig.from_pretrained(source)

    def load(self, source: str) -> tuple[Any, dict[str, Any]]:
        """Load a model in fp32, and tell which of its weights were missing or unexpected."""
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

    def image_positions(self, clip: Any) -> int:
        """Return the number of positions of an image in the vision tower."""
        positions: int = clip.vision_model.embeddings.position_embedding.num_embeddings
        return positions

    def lora_targets(
        self, clip: Any, towers: Sequence[str], maps: Sequence[str]
    ) -> str | list[str]:
        """Name the modules that get adapters as PEFT's ``target_modules`` do.

        ``towers`` are ``vision`` and ``text``, ``maps`` the linear maps of a layer by CLIP's names.
        """
        chosen = "|".join(f"{tower}_model" for tower in towers)
        return rf".*({chosen})\.encoder\.layers\..*\.({'|'.join(maps)})"

    def layers_above(self, clip: Any, name: str, part: str) -> int:
        """Count the encoder layers from a parameter of ``vision`` or ``text`` to the tower's end.

        That is one more than the number of layers for the token and patch embeddings.
        """
        layers: int = getattr(clip.config, f"{part}_config").num_hidden_layers
        if inside := re.search(r"\.encoder\.layers\.(\d+)\.", name):
            return layers - int(inside.group(1))
        below = ".embeddings." in name or ".pre_layrnorm." in name
        return layers + 1 if below else 0

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


class Siglip(Architecture):
    """``transformers.SiglipModel``: SigLIP, and SigLIP 2 at a fixed resolution."""

    projections = {VISUAL: "vision_model.head.mlp", TEXTUAL: "text_model.head"}  # noqa: RUF012
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
        patches = tower.post_layernorm(encoded)
        # Not len(): ONNX export would fix the batch size to this batch's
        probe = tower.head.probe.expand(patches.shape[0], -1, -1)
        pooled: Tensor = tower.head.attention(probe, patches, patches, need_weights=False)[0][:, 0]
        return pooled

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower, config = clip.text_model, clip.config.text_config
        # The tower was trained on texts whose end is followed by padding up to the full context
        ends = (input_ids == config.eos_token_id).long()
        after_end = ends.cumsum(1) - ends > 0
        missing = config.max_position_embeddings - input_ids.shape[1]
        padding: int = config.pad_token_id
        padded = functional.pad(
            input_ids.masked_fill(after_end, padding), (0, missing), value=padding
        )
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


class MetaClip2(Architecture):
    """``transformers.MetaClip2Model``: CLIP's modules under another name, with a multilingual
    tokenizer."""

    model_class = "MetaClip2Model"


class OpenClip(Architecture):
    """A CLIP whose image tower is timm's, which open_clip runs (``models.open_clip.backed``)."""

    export_formats = frozenset({"open_clip"})
    shardable = False

    def read_config(self, source: str) -> Any:
        from clipft.models.open_clip.backed import OpenClipConfig

        return OpenClipConfig.read(source)

    def load(self, source: str) -> tuple[Any, dict[str, Any]]:
        from clipft.models.open_clip.backed import load_backed

        return load_backed(source)

    def image_positions(self, clip: Any) -> int:
        return max(clip.vision_model.positions.values(), default=1)

    def lora_targets(
        self, clip: Any, towers: Sequence[str], maps: Sequence[str]
    ) -> str | list[str]:
        from clipft.models.open_clip.backed import lora_targets

        targets = list[str]()
        if "text" in towers:
            pattern = re.compile(str(super().lora_targets(clip, ["text"], maps)))
            targets += [name for name, _ in clip.named_modules() if pattern.fullmatch(name)]
        return [*targets, *(lora_targets(clip, maps) if "vision" in towers else ())]

    def layers_above(self, clip: Any, name: str, part: str) -> int:
        from clipft.models.open_clip.backed import blocks_above

        if part == "text":
            return super().layers_above(clip, name, part)
        return blocks_above(name, clip.config.vision_config.num_hidden_layers)

    def image_features(self, clip: Any, pixels: Tensor) -> Tensor:
        features: Tensor = clip.vision_model(pixels)
        return features


class BidirectionalOpenClip(OpenClip):
    """One in whose text tower tokens attend to those after them, and to padding: MobileCLIP."""

    pads_texts = True

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower, config = clip.text_model, clip.config.text_config
        ends = (input_ids == config.eos_token_id).long()
        after_end = ends.cumsum(1) - ends > 0
        missing = config.max_position_embeddings - input_ids.shape[1]
        # open_clip's tokenizer pads with 0, whatever that id stands for
        padded = functional.pad(input_ids.masked_fill(after_end, 0), (0, missing))
        hidden = tower.embeddings(input_ids=padded)
        pooled: Tensor = tower.final_layer_norm(
            encode_pooled(tower, hidden, ends.argmax(-1), causal=False)
        )
        return pooled


ARCHITECTURES: dict[str, Architecture] = dict(
    zip(
        FAMILIES,
        (Architecture(), Siglip(), MetaClip2(), OpenClip(), BidirectionalOpenClip()),
        strict=True,
    )
)
"""By the ``model_type`` of a checkpoint's configuration."""
