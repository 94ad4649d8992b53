"""Compares a converted model with open_clip's own encoders. open_clip must be installed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor
from torch.nn import functional

from clipft.core.errors import ModelError, first_line
from clipft.models.architectures import ARCHITECTURES
from clipft.models.open_clip.names import FOLDER
from clipft.models.open_clip.sources import Source

TOLERANCE = 1e-3
"""The largest allowed difference between components of unit embeddings. Rounding errors are far
smaller, even in the largest models."""
_TEXTS = [
    "a photo of two red chairs",
    "An oak table, with 4 drawers!",
    "lamp",
    "a blue sofa in a large room with white walls and a wooden floor",
]


@torch.inference_mode()
def check_difference(
    source: Source, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> float:
    """Embed noise and a few texts with both libraries, each with its own tokenizer.

    Args:
        source: the checkpoint.
        config: its ``model_cfg``.
        tensors: its weights, under the names of open_clip's ``CLIP``.
        folder: the converted model.

    Returns:
        The largest difference of a component.

    Raises:
        ModelError: open_clip cannot open the checkpoint, or gives other embeddings.
    """
    from transformers import AutoTokenizer

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    clip, _ = ARCHITECTURES[kind].load(str(folder))
    ours = _our_embeddings(clip.eval(), AutoTokenizer.from_pretrained(str(folder)))
    text = config["text_cfg"]
    options, context = text.get("tokenizer_kwargs") or {}, text.get("context_length", 77)
    if source.tokenizer:
        tokenizer: Any = HFTokenizer(source.tokenizer, context_length=context, **options)
    else:
        tokenizer = SimpleTokenizer(context_length=context, **options)
    try:
        model = make_open_clip(config, tensors)
    except Exception as error:  # open_clip checks little itself
        raise ModelError(
            f"open_clip cannot open {source.name}: {first_line(error)}", "check its configuration"
        ) from error
    difference = _largest(ours, _open_clip_embeddings(model, tokenizer, clip))
    if not difference < TOLERANCE:
        raise ModelError(
            f"{source.name} gives different embeddings in transformers and in open_clip: "
            f"components differ by up to {difference:.1e}",
            "please report this model; until then, choose another",
        )
    return difference


@torch.inference_mode()
def difference_of_folder(folder: Path, clip: Any, tokenizer: Any) -> float:
    """Open a folder with open_clip, and compare its embeddings with those of ``clip``.

    Returns:
        The largest difference of a component.
    """
    place = f"{FOLDER}{folder}"
    model, _, _ = open_clip.create_model_and_transforms(place)
    theirs = _open_clip_embeddings(model.eval(), open_clip.get_tokenizer(place), clip)
    return _largest(_our_embeddings(clip, tokenizer), theirs)


def _our_embeddings(clip: Any, tokenizer: Any) -> list[Tensor]:
    """Embed the inputs with the encoders that are used in training."""
    architecture = ARCHITECTURES[clip.config.model_type]
    context = clip.config.text_config.max_position_embeddings
    rows = [tokenizer(text, truncation=True, max_length=context).input_ids for text in _TEXTS]
    longest, end = max(map(len, rows)), clip.config.text_config.eos_token_id
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    features = architecture.image_features(clip, _noise(clip))
    images = architecture.project_images(clip, features)
    texts = architecture.project_texts(clip, architecture.text_features(clip, ids))
    return [functional.normalize(found, dim=-1) for found in (images, texts)]


def _open_clip_embeddings(model: Any, tokenizer: Any, clip: Any) -> list[Tensor]:
    return [
        model.encode_image(_noise(clip), normalize=True),
        model.encode_text(tokenizer(_TEXTS), normalize=True),
    ]


def _noise(clip: Any) -> Tensor:
    side = clip.config.vision_config.image_size
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def make_open_clip(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Make open_clip's model from a ``model_cfg`` and weights with the names of its ``CLIP``."""
    settings = {name: value for name, value in config.items() if name != "custom_text"}
    if not config.get("custom_text"):
        model: Any = open_clip.CLIP(**settings)
        state = dict(tensors)
    else:
        model = open_clip.CustomTextCLIP(**settings)
        image = ("visual.", "logit_")
        state = {n if n.startswith(image) else f"text.{n}": t for n, t in tensors.items()}
    state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    model.load_state_dict(state, assign=True)
    return model.eval()
