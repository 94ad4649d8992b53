"""Models whose image tower is from timm and run by open_clip (``models.open_clip.backed``)."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from clipft.config.sections.model import InputSizes
from clipft.core.errors import UsageError
from clipft.models.families.clip import Architecture, is_padding
from clipft.models.fast_encoder import encode_pooled

_NOT_OF_TRANSFORMERS = "transformers has no model like this one"


class OpenClip(Architecture):
    """A model with an image tower from timm and CLIP's own text tower."""

    not_exported = {  # noqa: RUF012
        **dict.fromkeys(("transformers", "onnx", "sentence-transformers"), _NOT_OF_TRANSFORMERS),
        "peft": "PEFT cannot open its base model",
    }
    unshardable = "open_clip runs its image tower"

    def read_config(self, source: str) -> Any:
        from clipft.models.open_clip.backed import OpenClipConfig

        return OpenClipConfig.read(source)

    def load(self, source: str) -> tuple[Any, dict[str, Any]]:
        from clipft.models.open_clip.backed import load_backed

        return load_backed(source)

    def resize_inputs(self, clip: Any, sizes: InputSizes) -> None:
        if sizes.image_size:
            raise UsageError(
                "--image-size needs an image tower of transformers", "run without --image-size"
            )
        super().resize_inputs(clip, sizes)

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
    """A model such as MobileCLIP, whose text tower also attends to later tokens and to padding."""

    pads_texts = True

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower, config = clip.text_model, clip.config.text_config
        missing = config.max_position_embeddings - input_ids.shape[1]
        # open_clip's tokenizer always pads with 0, whatever token has that id
        whole = input_ids.masked_fill(is_padding(input_ids, config.eos_token_id), 0)
        hidden = tower.embeddings(input_ids=functional.pad(whole, (0, missing)))
        end = (input_ids == config.eos_token_id).int().argmax(-1)
        pooled: Tensor = tower.final_layer_norm(encode_pooled(tower, hidden, end, causal=False))
        return pooled
