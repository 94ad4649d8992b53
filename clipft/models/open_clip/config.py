"""Translates open_clip's configurations of models to configurations of transformers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clipft.core.errors import ModelError
from clipft.models.open_clip.tensors import Rule, clip_rules, siglip_rules

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_TOP = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
}
_ANYWHERE = {"layers", "width", "mlp_ratio", "ls_init_value", "norm_kwargs", "act_kwargs"}
_HARMLESS = {"output_tokens", "final_ln_after_pool", "block_type"}
"""Settings without effect on the towers that can be converted."""
_VISION = {"head_width", "patch_size", "image_size", "pos_embed_type", "patch_dropout"}
_TEXT = {"heads", "context_length", "vocab_size", "pool_type", "eos_id", "pad_id"}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_kwargs"}
_UNLIKE_CLIP = {
    "timm_model_name": "its image tower is timm's {}",
    "hf_model_name": "its text tower is {} of transformers",
    "attentional_pool": "its image tower pools by attention",
    "no_ln_pre": "its image tower has no norm before its first layer",
    "embed_cls": "its text tower appends a class token",
    "no_causal_mask": "the tokens of a text attend to those after them",
    "proj_bias": "its text projection has a bias",
}
"""Settings that, if true, need something that transformers' CLIP does not have."""
_SIGLIP_TRUNK = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
SIGLIP_TOWERS = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
"""timm's image towers of SigLIP: width, layers, heads, and width of the MLP."""


_WITH_TANH = re.compile(r"base_patch32_256|large_patch16_512|(so400m|giantopt)_patch16_\d+")


def siglip_activation(size: str, patch: int, side: int) -> str:
    """Return the activation of timm's tower of this size, by its name in transformers."""
    tanh = _WITH_TANH.fullmatch(f"{size}_patch{patch}_{side}")
    return "gelu_pytorch_tanh" if tanh else "gelu"


class UnmappableError(Exception):
    """transformers has no model like this one; the message is a clause that says why."""


@dataclass(frozen=True)
class Target:
    """The model to which a checkpoint is converted.

    ``config`` are the arguments of its configuration, and ``rules`` are the names of its tensors.
    If transformers has no such model, ``model_class`` is ``OpenClipModel``, ``backed`` is the
    reason, and ``config`` is the content of ``config.json``.
    """

    model_class: str
    config: dict[str, Any]
    rules: list[Rule] = field(default_factory=list)
    backed: str = ""


def target_of(config: Mapping[str, Any], end: int | None) -> Target:
    """Find the model for a configuration of open_clip.

    Args:
        config: open_clip's ``model_cfg``.
        end: the id of the tokenizer's end token, -1 if it has none; None before it is known.

    Raises:
        UnmappableError: there is no such model.
    """
    try:
        return _of_transformers(config, end)
    except UnmappableError as unlike:
        try:
            return _backed(config, end, str(unlike))
        except UnmappableError:
            raise unlike from None


def check_supported(name: str, config: Mapping[str, Any]) -> None:
    """Check, before weights are downloaded, that there is a model for a configuration.

    Raises:
        ModelError: there is no such model.
    """
    try:
        target_of(config, None)
    except UnmappableError as error:
        raise unsupported(name, error) from error


def unsupported(name: str, error: UnmappableError) -> ModelError:
    return ModelError(
        f"cannot use {name}: {error}", "choose a CLIP with a vision transformer, or a SigLIP"
    )


def _of_transformers(config: Mapping[str, Any], end: int | None) -> Target:
    if unknown := sorted(config.keys() - _TOP):
        kind = "it is a CoCa" if "multimodal_cfg" in unknown else f"it has {unknown[0]}"
        raise UnmappableError(kind)
    trunk = _SIGLIP_TRUNK.fullmatch(str(config["vision_cfg"].get("timm_model_name")))
    return _siglip(config, trunk, end) if trunk else _clip(config, end)


def _clip(config: Mapping[str, Any], end: int | None) -> Target:
    vision, text = config["vision_cfg"], config["text_cfg"]
    _check_like_clip(vision)
    if isinstance(vision.get("layers"), list | tuple):
        raise UnmappableError("its image tower is a ResNet")
    _check_known(vision, _VISION | {"pool_type"})
    if vision.get("pool_type", "tok") != "tok":
        raise UnmappableError(f"its image tower pools with {vision['pool_type']}")
    _check_text(text, end)
    family = "MetaClip2" if end == 2 else "CLIP"  # with 2, CLIPModel pools at the highest id
    towers = {
        "vision_config": {**_vision(config), **_image_shape(vision)},
        "text_config": _text(config, end),
    }
    return Target(
        f"{family}Model",
        {"projection_dim": config["embed_dim"], **towers},
        clip_rules(vision.get("layers", 12), text.get("layers", 12)),
    )


def _backed(config: Mapping[str, Any], end: int | None, why: str) -> Target:
    """Describe an ``OpenClipModel``, with timm's image tower and CLIP's text tower.

    In some models, such as MobileCLIP, tokens attend in both directions, and to padding.
    """
    vision, text = config["vision_cfg"], dict(config["text_cfg"])
    name = str(vision.get("timm_model_name") or "")
    if config.keys() - _TOP or not re.fullmatch(r"[\w.]+", name):  # or it is on the hub
        raise UnmappableError("its image tower is not timm's")
    both_ways = bool(text.pop("no_causal_mask", False))
    _check_text(text, end)
    described = {
        "model_type": "open_clip_bidirectional" if both_ways else "open_clip",
        "model_cfg": dict(config),
        "text_config": _text(config, end),
    }
    return Target("OpenClipModel", described, backed=why)


def _check_like_clip(settings: Mapping[str, Any]) -> None:
    for name, why in _UNLIKE_CLIP.items():
        if settings.get(name):
            raise UnmappableError(why.format(settings[name]))


def _check_text(text: Mapping[str, Any], end: int | None) -> None:
    _check_like_clip(text)
    _check_known(text, _TEXT | _TOKENIZER | {"proj_type"})
    if text.get("proj_type", "linear") != "linear":
        raise UnmappableError("its text tower has no projection")
    if end is not None:
        _check_pooling(text, end)


def _check_pooling(text: Mapping[str, Any], end: int) -> None:
    """Check that texts are pooled at their end token.

    Raises:
        UnmappableError: texts are pooled elsewhere.
    """
    pool, pooled_id = text.get("pool_type", "argmax"), text.get("eos_id", 2)
    if pool == "argmax":  # the highest id of a text
        pooled_id = text.get("vocab_size", 49408) - 1
    if pool not in {"argmax", "eos"} or pooled_id != end:
        where = f"at id {pooled_id}" if pool in {"argmax", "eos"} else f"by {pool}"
        if end < 0:
            raise UnmappableError(f"it pools texts {where}, and its tokenizer has no end token")
        raise UnmappableError(f"it pools texts {where}, and its tokenizer ends them with {end}")


def _siglip(config: Mapping[str, Any], trunk: "re.Match[str]", end: int | None) -> Target:
    vision, text = config["vision_cfg"], config["text_cfg"]
    _check_like_clip({"hf_model_name": text.get("hf_model_name")})
    timm = {"timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "image_size"}
    _check_known(vision, timm)
    _check_known(text, _TEXT | _TOKENIZER | {"no_causal_mask", "proj_bias", "proj_type"})
    projected = text.get("proj_bias") or text.get("proj_type") == "none"
    if text.get("pool_type") != "last" or not text.get("no_causal_mask") or not projected:
        raise UnmappableError("its text tower is not SigLIP's")
    if vision.get("timm_pool") != "map" or vision.get("timm_proj") not in {"none", "", None}:
        raise UnmappableError("its image tower does not pool like SigLIP's")
    size, patch, side = trunk.groups()
    if image_side(vision) != int(side):
        raise UnmappableError(
            f"timm's {trunk.group()} takes no images of {image_side(vision)} pixels"
        )
    width, layers, heads, mlp = SIGLIP_TOWERS[size]
    towers = {
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": mlp,
            "hidden_act": siglip_activation(size, int(patch), int(side)),
            "layer_norm_eps": 1e-6,
            "image_size": int(side),
            "patch_size": int(patch),
        },
        "text_config": {**_text(config, end), "projection_size": config["embed_dim"]},
    }
    return Target("SiglipModel", towers, siglip_rules(layers, text.get("layers", 12)))


def _check_known(settings: Mapping[str, Any], known: set[str]) -> None:
    for name in sorted(settings.keys() - known - _ANYWHERE - _HARMLESS - _UNLIKE_CLIP.keys()):
        if settings[name] not in (None, False, 0):
            raise UnmappableError(f"it has {name}")


def _image_shape(vision: Mapping[str, Any]) -> dict[str, int]:
    return {"image_size": image_side(vision), "patch_size": vision.get("patch_size", 16)}


def image_side(vision: Mapping[str, Any]) -> int:
    """Return the side of the square images in a ``vision_cfg``, in pixels.

    Raises:
        UnmappableError: the images are not square.
    """
    size = vision.get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UnmappableError(f"its images have {' x '.join(map(str, size))} pixels")
    side: int = sides.pop()
    return side


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_cfg"]
    heads = vision.get("width", 768) // vision.get("head_width", 64)
    return {**_encoder(vision, 768, bool(config.get("quick_gelu"))), "num_attention_heads": heads}


def _text(config: Mapping[str, Any], end: int | None) -> dict[str, Any]:
    text = config["text_cfg"]
    return {
        **_encoder(text, 512, bool(config.get("quick_gelu"))),
        "num_attention_heads": text.get("heads", 8),
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": text.get("context_length", 77),
        "eos_token_id": end,
    }


def _encoder(tower: Mapping[str, Any], width: int, quick_gelu: bool) -> dict[str, Any]:
    width = tower.get("width", width)
    act = tower.get("act_kwargs") or {}
    if act not in ({}, {"approximate": "tanh"}, {"approximate": "none"}):
        raise UnmappableError(f"it has act_kwargs {act}")
    gelu = "gelu_pytorch_tanh" if act.get("approximate") == "tanh" else "gelu"
    return {
        "hidden_size": width,
        "intermediate_size": int(width * tower.get("mlp_ratio", 4.0)),
        "num_hidden_layers": tower.get("layers", 12),
        "hidden_act": "quick_gelu" if quick_gelu else gelu,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def openai_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Derive open_clip's configuration from the shapes of OpenAI's weights.

    All of OpenAI's models have QuickGELU and heads of width 64.

    Raises:
        UnmappableError: the image tower is not a vision transformer.
    """
    if "visual.attnpool.c_proj.weight" in shapes:
        raise UnmappableError("its image tower is a ResNet")
    width, _, _, patch = shapes["visual.conv1.weight"]
    positions, _ = shapes["visual.positional_embedding"]
    context, text_width = shapes["positional_embedding"]

    def layers(of: str) -> int:
        return sum(name.startswith(of) and name.endswith(".ln_1.weight") for name in shapes)

    return {
        "embed_dim": shapes["text_projection"][1],
        "quick_gelu": True,
        "vision_cfg": {
            "layers": layers("visual."),
            "width": width,
            "patch_size": patch,
            "image_size": patch * round((positions - 1) ** 0.5),
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": shapes["token_embedding.weight"][0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": layers("transformer."),
        },
    }
