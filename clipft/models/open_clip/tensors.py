"""Maps weights from open_clip's names to those of transformers, and back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Layout:
    """Functions that turn tensors of open_clip into tensors of transformers, and back."""

    to_transformers: Callable[[Tensors], Tensors]
    to_open_clip: Callable[[Tensors], Tensors]


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _transposed(tensors: Tensors) -> Tensors:
    return [tensors[0].T.contiguous()]


def _joined(tensors: Tensors) -> Tensors:
    return [torch.cat(tensors)]


def _query_and_rest(tensors: Tensors) -> Tensors:
    third = len(tensors[0]) // 3
    return [tensors[0][:third], tensors[0][third:]]


SAME = Layout(_same, _same)
TRANSPOSED = Layout(_transposed, _transposed)
FUSED = Layout(lambda fused: [part.clone() for part in fused[0].chunk(3)], _joined)
"""Query, key and value are one matrix in open_clip and three in transformers."""
FUSED_POOL = Layout(_joined, _query_and_rest)
"""In SigLIP's attention pool, transformers has one matrix, and timm a separate query."""
POSITIONS = Layout(lambda rows: [rows[0][0]], lambda rows: [rows[0][None]])
"""timm's positions have a leading axis of length 1."""
SCALAR = Layout(lambda value: [value[0].reshape(())], lambda value: [value[0].reshape(())])
VECTOR = Layout(lambda value: [value[0].reshape(1)], lambda value: [value[0].reshape(())])
"""SiglipModel keeps its temperature and bias in vectors of length 1."""


@dataclass(frozen=True)
class Rule:
    """``theirs`` are names in open_clip, ``ours`` those in transformers."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout = SAME


def _one(theirs: str, ours: str, layout: Layout = SAME) -> Rule:
    return Rule((theirs,), (ours,), layout)


def _with_bias(theirs: str, ours: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield _one(f"{theirs}.{kind}", f"{ours}.{kind}")


def _layers(count: int, theirs: str, ours: str, names: Mapping[str, str], fused: str) -> list[Rule]:
    """Return the rules of an encoder's layers. ``fused`` is the name of the fused matrix of query,
    key and value, without ``weight`` and ``bias``."""
    rules = list[Rule]()
    for number in range(count):
        layer, block = f"{ours}.encoder.layers.{number}", f"{theirs}.{number}"
        for theirs_in_layer, ours_in_layer in names.items():
            rules += _with_bias(f"{block}.{theirs_in_layer}", f"{layer}.{ours_in_layer}")
        for kind in ("weight", "bias"):
            split = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(Rule((f"{block}.{fused}{kind}",), split, FUSED))
    return rules


_RESBLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _text_tower(layers: int) -> list[Rule]:
    embeddings = "text_model.embeddings"
    return [
        _one("token_embedding.weight", f"{embeddings}.token_embedding.weight"),
        _one("positional_embedding", f"{embeddings}.position_embedding.weight"),
        *_layers(layers, "transformer.resblocks", "text_model", _RESBLOCK, "attn.in_proj_"),
        *_with_bias("ln_final", "text_model.final_layer_norm"),
    ]


def clip_rules(image_layers: int, text_layers: int) -> list[Rule]:
    """Map open_clip's ``CLIP`` with a plain vision transformer to ``CLIPModel``."""
    embeddings, resblocks = "vision_model.embeddings", "visual.transformer.resblocks"
    return [
        _one("visual.class_embedding", f"{embeddings}.class_embedding"),
        _one("visual.positional_embedding", f"{embeddings}.position_embedding.weight"),
        _one("visual.conv1.weight", f"{embeddings}.patch_embedding.weight"),
        *_with_bias("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_layers(image_layers, resblocks, "vision_model", _RESBLOCK, "attn.in_proj_"),
        *_with_bias("visual.ln_post", "vision_model.post_layernorm"),
        _one("visual.proj", "visual_projection.weight", TRANSPOSED),
        *_projected_text_tower(text_layers),
    ]


def _projected_text_tower(layers: int) -> list[Rule]:
    return [
        *_text_tower(layers),
        _one("text_projection", "text_projection.weight", TRANSPOSED),
        _one("logit_scale", "logit_scale", SCALAR),
    ]


def backed_rules(names: Iterable[str], projection: str, text_layers: int) -> list[Rule]:
    """Map a model whose image tower is open_clip's own to ``OpenClipModel``.

    ``names`` are the tensors of the ``OpenClipModel``. ``projection`` is the path of the projection
    in open_clip's image tower.
    """
    places = {"vision_model.tower.": "visual.", "visual_projection.": f"visual.{projection}."}
    images = [
        _one(theirs + name.removeprefix(ours), name)
        for name in names
        for ours, theirs in places.items()
        if name.startswith(ours)
    ]
    return [*images, *_projected_text_tower(text_layers)]


def siglip_rules(image_layers: int, text_layers: int) -> list[Rule]:
    """Map open_clip's SigLIP, whose image tower is timm's, to ``SiglipModel``."""
    embeddings, head = "vision_model.embeddings", "vision_model.head"
    trunk, pool = "visual.trunk", "visual.trunk.attn_pool"
    return [
        _one(f"{trunk}.pos_embed", f"{embeddings}.position_embedding.weight", POSITIONS),
        *_with_bias(f"{trunk}.patch_embed.proj", f"{embeddings}.patch_embedding"),
        *_layers(image_layers, f"{trunk}.blocks", "vision_model", _TIMM_BLOCK, "attn.qkv."),
        *_with_bias(f"{trunk}.norm", "vision_model.post_layernorm"),
        _one(f"{pool}.latent", f"{head}.probe"),
        *(
            Rule(
                (f"{pool}.q.{kind}", f"{pool}.kv.{kind}"),
                (f"{head}.attention.in_proj_{kind}",),
                FUSED_POOL,
            )
            for kind in ("weight", "bias")
        ),
        *_with_bias(f"{pool}.proj", f"{head}.attention.out_proj"),
        *_with_bias(f"{pool}.norm", f"{head}.layernorm"),
        *_with_bias(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *_with_bias(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
        *_text_tower(text_layers),
        *_with_bias("text_projection", "text_model.head"),
        _one("logit_scale", "logit_scale", VECTOR),
        _one("logit_bias", "logit_bias", VECTOR),
    ]


def to_transformers(tensors: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Rename and reshape the tensors of an open_clip model. All tensors in the rules must exist."""
    found: dict[str, Tensor] = {}
    for rule in rules:
        results = rule.layout.to_transformers([tensors[name] for name in rule.theirs])
        found.update(zip(rule.ours, results, strict=True))
    return found


def to_open_clip(tensors: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Undo ``to_transformers``."""
    found: dict[str, Tensor] = {}
    for rule in rules:
        results = rule.layout.to_open_clip([tensors[name] for name in rule.ours])
        found.update(zip(rule.theirs, results, strict=True))
    return found


def fold_layer_scale(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply layer scales into the preceding maps, because transformers' CLIP has no scales."""
    folded = dict(tensors)
    for name in tensors:
        for scale, before in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj")):
            if name.endswith(f".{scale}.gamma"):
                gamma, path = folded.pop(name), name.removesuffix(f"{scale}.gamma") + before
                folded[f"{path}.weight"] = folded[f"{path}.weight"] * gamma[:, None]
                folded[f"{path}.bias"] = folded[f"{path}.bias"] * gamma
    return folded
