"""Families whose text tower is a BERT: each token attends to all others, and the first is pooled.

Their image tower is CLIP's. The text towers have far more positions than the captions of their
contrastive training had tokens.
"""

from typing import Any, ClassVar

from torch import Tensor

from clipft.config.sections.model import InputSizes
from clipft.core.errors import UsageError
from clipft.models.families.clip import CLIP_MAPS, Architecture, is_padding
from clipft.models.positions import resize_images

_BERT_MAPS = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


class ChineseClip(Architecture):
    """``transformers.ChineseCLIPModel``."""

    layers = {**Architecture.layers, "text": "text_model.encoder.layer"}  # noqa: RUF012
    maps = {"vision": CLIP_MAPS, "text": _BERT_MAPS}  # noqa: RUF012
    slower = "its text tower runs"
    model_class = "ChineseCLIPModel"
    processor_class = "ChineseCLIPProcessor"
    not_exported = {  # noqa: RUF012
        "open_clip": "open_clip has no model like this one: its text tower is a BERT"
    }
    unshardable = "its text tower is a BERT"
    trained_length: ClassVar[int] = 52
    """The context length with which the authors trained, in tokens."""

    def positions(self, config: Any) -> int:
        """Return the number of tokens for which the text tower has position embeddings."""
        count: int = config.text_config.max_position_embeddings
        return count

    def context_length(self, config: Any, tokenizer: Any) -> int:
        # The tokenizer's configuration in an export contains a changed context length
        positions, stated = self.positions(config), int(tokenizer.model_max_length)
        return stated if stated < positions else min(self.trained_length, positions)

    def resize_inputs(self, clip: Any, sizes: InputSizes) -> None:
        if sizes.context_length > (most := self.positions(clip.config)):
            raise UsageError(
                f"--context-length {sizes.context_length}: this text tower has positions for "
                f"{most} tokens",
                f"use {most} or less",
            )
        if sizes.image_size:
            resize_images(clip, sizes.image_size)

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        return self._encoded(clip.text_model, clip.config.text_config, input_ids)

    def _encoded(self, bert: Any, config: Any, input_ids: Tensor) -> Tensor:
        padding = is_padding(input_ids, config.eos_token_id)
        hidden = bert.embeddings(input_ids=input_ids.masked_fill(padding, config.pad_token_id))
        # transformers leaves out a mask that hides nothing, and must wait for the device to check
        # this, so the mask is made here
        mask = ~padding[:, None, None]
        first: Tensor = bert.encoder(hidden, attention_mask=mask).last_hidden_state[:, 0]
        return first


class AltClip(ChineseClip):
    """``transformers.AltCLIPModel``, whose text tower is XLM-RoBERTa."""

    layers = {**Architecture.layers, "text": "text_model.roberta.encoder.layers"}  # noqa: RUF012
    model_class = "AltCLIPModel"
    processor_class = "AltCLIPProcessor"
    trained_length = 77

    def positions(self, config: Any) -> int:
        # RoBERTa's first position is one more than the id of the padding token
        text = config.text_config
        count: int = text.max_position_embeddings - text.pad_token_id - 1
        return count

    def text_features(self, clip: Any, input_ids: Tensor) -> Tensor:
        tower = clip.text_model
        first = self._encoded(tower.roberta, clip.config.text_config, input_ids)
        features: Tensor = tower.transformation(tower.pre_LN(first))
        return features
