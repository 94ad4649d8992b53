"""Writes a folder that ``open_clip.create_model_and_transforms("local-dir:...")`` opens.

The folder holds the configuration, the weights as safetensors, and the tokenizer, unless it is
CLIP's, which is part of open_clip.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipft.core.errors import ModelError
from clipft.models.huggingface import public_name, write_tokenizer
from clipft.models.open_clip.config import SIGLIP_TOWERS, siglip_activation
from clipft.models.open_clip.names import CONFIG_FILE
from clipft.models.open_clip.sources import open_clip_installed
from clipft.models.open_clip.tensors import Rule, clip_rules, siglip_rules, to_open_clip
from clipft.models.open_clip.weights import write_weights
from clipft.models.pretrained import PretrainedModel

WEIGHTS_FILE = "open_clip_model.safetensors"
_CLIP_VOCABULARY = "47f9dc80b53d1df77f5261384b5a9101"
"""Hash of the tokens and ids of CLIP's own tokenizer."""
_EPS = 1e-5
"""The epsilon of open_clip's norms, unless its configuration contains another."""
_RESOLUTIONS = {
    ("base", 16): {224, 256, 384, 512},
    ("base", 32): {256},
    ("large", 16): {256, 384, 512},
    ("so400m", 14): {224, 378, 384},
    ("so400m", 16): {256, 384, 512},
    ("giantopt", 16): {256, 384},
}
"""Image sizes of timm's image towers of SigLIP, by the tower's size and its patch size."""


class _NoForm(Exception):
    """open_clip has no model like this one; the message is a clause that says why."""


def open_clip_lacks(base: PretrainedModel) -> str:
    """Return the reason why open_clip has no model like this one; "" if it has one."""
    try:
        _config(base)
    except _NoForm as error:
        return str(error)
    return ""


def write_open_clip(clip: Any, base: PretrainedModel, bias: float | None, folder: Path) -> None:
    """Write a merged model.

    Args:
        clip: the model of transformers, with adapters merged.
        base: the pretrained model.
        bias: the bias that the sigmoid loss added to a CLIP, or None.
        folder: the folder to make.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    import torch

    model, inputs = dict(_config(base)), base.inputs
    tensors = to_open_clip(clip.state_dict(), _rules(clip))
    if bias is not None:
        model["init_logit_bias"] = bias
        tensors["logit_bias"] = torch.tensor(bias)
    if model.get("custom_text"):
        image = ("visual.", "logit_")
        tensors = {n if n.startswith(image) else f"text.{n}": t for n, t in tensors.items()}
    preprocess = {
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "interpolation": "bicubic",
        "resize_mode": "squash" if inputs.squashed else "shortest",
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_weights(tensors, folder / WEIGHTS_FILE)
    if "hf_tokenizer_name" in model["text_cfg"]:
        write_tokenizer(base, folder)


def check_open_clip(folder: Path, clip: Any, base: PretrainedModel) -> float | None:
    """Open a written folder with open_clip and compare the embeddings of both libraries.

    Returns:
        The largest difference of a component; None if open_clip is not installed.

    Raises:
        ModelError: open_clip gives other embeddings.
    """
    if not open_clip_installed():
        return None
    from clipft.models.open_clip.compare import TOLERANCE, difference_of_folder

    difference = difference_of_folder(folder, clip, base.inputs.tokenizer)
    if not difference < TOLERANCE:
        raise ModelError(
            f"open_clip gives different embeddings: components differ by up to {difference:.1e}",
            "nothing was exported; use --format transformers, and please report this model",
        )
    return difference


def _rules(clip: Any) -> list[Rule]:
    """Return the names of a transformers model's tensors in open_clip, as rules."""
    kind = clip.config.model_type
    if kind.startswith("open_clip"):
        own: list[Rule] = clip.rules()
        return own
    layers = [
        tower.num_hidden_layers for tower in (clip.config.vision_config, clip.config.text_config)
    ]
    return siglip_rules(*layers) if kind == "siglip" else clip_rules(*layers)


def _config(base: PretrainedModel) -> Mapping[str, Any]:
    """Return the ``model_cfg`` of a model in open_clip.

    Raises:
        _NoForm: open_clip has no such model.
    """
    kind = base.model.config.model_type
    if kind.startswith("open_clip"):
        found: dict[str, Any] = base.model.config.model_cfg
        length = base.model.config.text_config.max_position_embeddings
        return {**found, "text_cfg": {**found["text_cfg"], "context_length": length}}
    return _siglip_config(base) if kind == "siglip" else _clip_config(base)


def _clip_config(base: PretrainedModel) -> Mapping[str, Any]:
    config = base.model.config
    vision, text = config.vision_config, config.text_config
    model = {
        "embed_dim": config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_encoder(vision),
        },
        "text_cfg": _text(base),
    }
    quick = vision.hidden_act == "quick_gelu"
    if quick != (text.hidden_act == "quick_gelu"):
        raise _NoForm(f"its towers have {vision.hidden_act} and {text.hidden_act}")
    if quick:
        model["quick_gelu"] = True
    return model


def _siglip_config(base: PretrainedModel) -> Mapping[str, Any]:
    vision = base.model.config.vision_config
    shape = (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
    )
    sizes = {tower: size for size, tower in SIGLIP_TOWERS.items()}
    size, patch, side = sizes.get(shape, ""), vision.patch_size, vision.image_size
    if side not in _RESOLUTIONS.get((size, patch), ()):
        raise _NoForm(
            f"timm has no image tower of SigLIP with {shape[1]} layers of width {shape[0]} for "
            f"{side} pixels in patches of {patch}"
        )
    expected = siglip_activation(size, patch, side)
    if vision.hidden_act != expected:
        raise _NoForm(f"its image tower has {vision.hidden_act}, and timm's has {expected}")
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": side,
            "timm_model_name": f"vit_{size}_patch{patch}_siglip_{side}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_text(base),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _text(base: PretrainedModel) -> dict[str, Any]:
    text, tokenizer = base.model.config.text_config, base.inputs.tokenizer
    config = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
        **_encoder(text),
    }
    if not _is_clips_own(tokenizer):
        config["hf_tokenizer_name"] = public_name(base.name)
        config |= {"pool_type": "eos", "eos_id": int(tokenizer.eos_token_id)}
    return config


def _encoder(tower: Any) -> dict[str, Any]:
    """Return open_clip's configuration of an encoder of transformers."""
    config: dict[str, Any] = {"width": tower.hidden_size, "layers": tower.num_hidden_layers}
    ratio = tower.intermediate_size / tower.hidden_size
    if int(tower.hidden_size * ratio) != tower.intermediate_size:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    config["mlp_ratio"] = ratio
    if tower.layer_norm_eps != _EPS:
        config["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if tower.hidden_act == "gelu_pytorch_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    elif tower.hidden_act not in {"gelu", "quick_gelu"}:
        raise _NoForm(f"its activation is {tower.hidden_act}")
    return config


def _is_clips_own(tokenizer: Any) -> bool:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.blake2b(vocabulary, digest_size=16).hexdigest() == _CLIP_VOCABULARY
