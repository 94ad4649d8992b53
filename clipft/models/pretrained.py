"""Loads a pretrained CLIP or SigLIP: its weights, its tokenizer and its image preprocessing."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.sections.model import OWN_SIZES, InputSizes
from clipft.core.errors import ModelError
from clipft.core.patches import Patches
from clipft.models.adapters import merge_adapter
from clipft.models.architectures import ARCHITECTURES, Architecture
from clipft.models.complete import (
    check_finite,
    check_normalization,
    check_tokenizer,
    check_weights,
)
from clipft.models.source import base_of, find_model, loading_errors, quiet_libraries


@dataclass(frozen=True)
class ModelInputs:
    """The texts and images that a model takes.

    Images are squares with a side of ``image_size`` pixels. ``mean`` and ``std`` normalize pixel
    values in 0..1, per channel. If ``squashed``, an image of any shape is resized to the square;
    otherwise the square is cropped from it. With ``patches``, images keep their shape instead, and
    ``image_size`` is the side of a square with as many pixels. Texts have at most
    ``context_length`` tokens.
    """

    tokenizer: Any
    context_length: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    squashed: bool = False
    patches: Patches | None = None

    def blank_images(self, count: int) -> Any:
        """Make black images in the form of the loader's: uint8 [count, ...]. None is padded."""
        import torch

        if not self.patches:
            return torch.zeros(count, 3, self.image_size, self.image_size, dtype=torch.uint8)
        strips = torch.zeros(count, *self.patches.shape, dtype=torch.uint8)
        self.patches.write_grid(strips, 1, self.patches.most)
        return strips

    @property
    def images(self) -> str:
        """The images that the model takes, in words that follow "images of"."""
        if self.patches:
            size = self.patches.size
            return f"any shape, as up to {self.patches.most} patches of {size} x {size} pixels,"
        return f"{self.image_size} x {self.image_size} pixels"

    @property
    def seen_images(self) -> str:
        """A text that is equal for models that preprocess images in the same way."""
        size = str(self.patches) if self.patches else f"{self.image_size} {self.squashed}"
        return f"{size} {self.mean} {self.std}"


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained CLIP. ``model`` is the model that its architecture loads, in fp32.

    ``conversion`` says how it was converted from a checkpoint of open_clip, "" if it was not.
    """

    name: str
    model: Any
    inputs: ModelInputs
    parameters_count: int
    sizes: InputSizes = OWN_SIZES
    conversion: str = ""

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model.config.model_type]

    def remarks(self) -> list[str]:
        """Say how the model was converted, and which part of it is not as fast as CLIP's."""
        remarks = [f"{self.name}: {self.conversion}."] if self.conversion else []
        if slower := self.architecture.slower:
            remarks.append(
                f"{self.name}: {slower} in the code of transformers. The faster encoder of clipft "
                "fits CLIP's towers only."
            )
        return remarks

    @property
    def width(self) -> int:
        """The hidden size of the wider of the two encoders."""
        config = self.model.config
        parts = (config.vision_config, config.text_config)
        return max(getattr(part, "hidden_size", 0) for part in parts)

    def fingerprint(self) -> str:
        """A hash of the model's shape and of every weight. It is equal for equal models."""
        # Only settings that do not differ between versions of transformers
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        vision, text = self.model.config.vision_config, self.model.config.text_config
        config = {
            "vision": [
                getattr(vision, key, None)
                for key in (*shape, "image_size", "patch_size", "hidden_act")
            ],
            "text": [getattr(text, key) for key in (*shape, "vocab_size", "hidden_act")],
        }
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load_pretrained(name: str, sizes: InputSizes = OWN_SIZES) -> PretrainedModel:
    """Load the model of a hub id, of a local folder, or ``tiny``, in fp32 on the CPU.

    A folder or hub id may also hold a PEFT adapter, which is merged into its base model. ``sizes``
    change the model's context length and image size.

    Raises:
        ModelError: it is missing, broken, incomplete, not a CLIP, or cannot be downloaded.
        UsageError: the model cannot have these sizes.
    """
    inputs = load_inputs(name, sizes)
    files = find_model(name)
    with loading_errors(name):
        model, found = ARCHITECTURES[files.family].load(files.source)
        check_weights(name, found)
        if base_of(name):
            model = merge_adapter(model, name)
        check_finite(name, model.named_parameters())
    # Texts are pooled at the tokenizer's end token and padded with its padding token. The ids in
    # the configuration are unreliable: in early CLIPs the end token is 2, for which transformers
    # pools at the highest id instead, and in SigLIP the ids are outside the vocabulary.
    tokenizer, config = inputs.tokenizer, model.config.text_config
    end = tokenizer.eos_token_id
    config.eos_token_id = model.text_model.eos_token_id = end
    config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ARCHITECTURES[files.family].resize_inputs(model, sizes)
    parameters = sum(p.numel() for p in model.parameters())
    conversion = _conversion(files.source)
    return PretrainedModel(name, model.eval(), inputs, parameters, sizes, conversion)


def load_inputs(name: str, sizes: InputSizes = OWN_SIZES) -> ModelInputs:
    """Load only the tokenizer and the image preprocessing of a model, without its weights.

    Raises:
        ModelError: as for ``load_pretrained``; or the model does not take square images.
    """
    quiet_libraries()
    from transformers import AutoTokenizer

    files = find_model(name)
    architecture, processor = ARCHITECTURES[files.family], files.image_processor
    with loading_errors(name):
        config = architecture.read_config(files.source)
        tokenizer = AutoTokenizer.from_pretrained(files.source, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token = tokenizer.sep_token  # BERT's name for it
        check_normalization(name, processor)
        vocab_size = config.text_config.vocab_size
        check_tokenizer(name, tokenizer, vocab_size, pools_at_end=not architecture.pads_texts)
    # An image processor's size has either shortest_edge, and images are cropped, or height and
    # width
    size, defaults = processor.get("size"), architecture.image_defaults
    patches = architecture.patches(config, processor, sizes.image_size)
    side = patches.side if patches else sizes.image_size or _image_size(name, config)
    return ModelInputs(
        tokenizer=tokenizer,
        context_length=sizes.context_length or architecture.context_length(config, tokenizer),
        image_size=side,
        mean=tuple(processor.get("image_mean", defaults.mean)),
        std=tuple(processor.get("image_std", defaults.std)),
        squashed="height" in size if isinstance(size, dict) else defaults.squashed,
        patches=patches,
    )


def _image_size(name: str, config: Any) -> int:
    sides = config.vision_config.image_size
    different = {sides} if isinstance(sides, int) else set(sides)
    if len(different) != 1:
        raise ModelError(
            f"{name} takes images of {sides} pixels, which are not square", "choose another model"
        )
    side: int = different.pop()
    return side


def _conversion(source: str) -> str:
    from clipft.models.open_clip.convert import read_report

    return str(read_report(Path(source)) or "")
