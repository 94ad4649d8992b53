"""Models whose image tower is not in transformers, so that open_clip runs it with timm.

The text tower is CLIP's, in the modules of transformers. The projections and the temperature, which
scenarios refer to, also have the names of transformers.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clipft.core.errors import ModelError
from clipft.models.open_clip.sources import open_clip_installed
from clipft.models.open_clip.tensors import Rule, backed_rules

_WITHOUT_DROPOUT = {"timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None}
_MAPS = {
    "q_proj": ("qkv", "q_proj"),
    "k_proj": ("qkv", "k_proj"),
    "v_proj": ("qkv", "v_proj"),
    "out_proj": ("proj",),
    "fc1": ("fc1", "fc1_g", "fc1_x"),
    "fc2": ("fc2",),
}
"""timm's names for the linear maps of an encoder layer. Most towers fuse query, key and value."""
_PROBES = 3


class OpenClipConfig:
    """The content of ``config.json`` in a converted folder. ``model_cfg`` is open_clip's."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        from transformers import CLIPTextConfig

        self._content = dict(content)
        self.model_type: str = content["model_type"]
        self.name: str = content["name"]
        self.model_cfg: dict[str, Any] = content["model_cfg"]
        self.projection_dim: int = self.model_cfg["embed_dim"]
        self.text_config = CLIPTextConfig(**content["text_config"])
        vision = self.model_cfg["vision_cfg"]
        self.vision_config = SimpleNamespace(
            image_size=vision.get("image_size", 224),
            hidden_act=vision["timm_model_name"],  # tells models apart
            layer_norm_eps=None,  # decided by timm
            num_hidden_layers=0,
            _attn_implementation="sdpa",
            **dict.fromkeys(
                ("hidden_size", "num_attention_heads", "intermediate_size", "patch_size")
            ),
        )

    @staticmethod
    def read(folder: str | Path) -> "OpenClipConfig":
        return OpenClipConfig(json.loads((Path(folder) / "config.json").read_text("utf-8")))

    def to_dict(self) -> dict[str, Any]:
        return self._content


class ImageTower(nn.Module):
    """open_clip's image tower without its projection: pixels [B, 3, S, S] -> features [B, W].

    Its dropout is turned off, and its batch norms keep their pretrained statistics. Otherwise the
    results would depend on how pairs are batched.
    """

    def __init__(self, visual: nn.Module, config: SimpleNamespace) -> None:
        super().__init__()
        self.tower, self.config = visual, config
        self.encoder = SimpleNamespace(layers=())  # none that the fast encoder can run
        self.positions: dict[str, int] = {}  # of the linear maps that may get adapters
        for module in visual.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def train(self, mode: bool = True) -> "ImageTower":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.tower(pixels)
        return features


class OpenClipModel(nn.Module):
    """A model with the parts of a ``CLIPModel`` under the same names."""

    base_model_prefix = ""  # PEFT reads it from models that contain modules of transformers

    def __init__(self, config: OpenClipConfig) -> None:
        from open_clip.model import _build_vision_tower
        from transformers import CLIPTextModel

        super().__init__()
        settings = {**config.model_cfg["vision_cfg"], **_WITHOUT_DROPOUT}
        quick_gelu = bool(config.model_cfg.get("quick_gelu"))
        visual = _build_vision_tower(config.projection_dim, settings, quick_gelu)
        self.config, self.projection_path = config, _projection_path(visual)
        self.visual_projection = visual.get_submodule(self.projection_path)
        visual.set_submodule(self.projection_path, nn.Identity())
        config.vision_config.num_hidden_layers = len(_blocks(visual))
        self.vision_model = ImageTower(visual, config.vision_config)
        text = config.text_config
        self.text_model = CLIPTextModel._from_config(text, attn_implementation="sdpa")
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        self.text_model.gradient_checkpointing_enable(options)
        tower: Any = self.vision_model.tower
        tower.set_grad_checkpointing(True)

    def rules(self) -> list[Rule]:
        """Return the names of the tensors in open_clip, as rules."""
        return backed_rules(
            [name for name, _ in self.state_dict().items()],
            self.projection_path,
            self.config.text_config.num_hidden_layers,
        )


def load_backed(source: str) -> tuple[OpenClipModel, dict[str, Any]]:
    """Load a converted folder in float32.

    Returns:
        The model, and its loading info as transformers returns it.

    Raises:
        ModelError: open_clip is not installed.
    """
    from safetensors.torch import load_file

    config = OpenClipConfig.read(source)
    name = config.model_cfg["vision_cfg"]["timm_model_name"]
    require_open_clip(config.name, f"its image tower is timm's {name}")
    model = OpenClipModel(config)
    found = model.load_state_dict(load_file(Path(source) / "model.safetensors"), strict=False)
    missing, unexpected = map(set, found)
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": set()}
    return model.eval(), info


def require_open_clip(name: str, why: str) -> None:
    """Check that open_clip, which must run the image tower of a model, is installed.

    Raises:
        ModelError: open_clip is not installed.
    """
    if not open_clip_installed():
        raise ModelError(
            f"{name} needs open_clip, because {why}",
            "pip install 'clipft[open_clip]', or pipx inject clipft open_clip_torch",
        )


def lora_targets(model: OpenClipModel, maps: Sequence[str]) -> list[str]:
    """Return the names of the linear maps of the image tower that can have adapters.

    They are found in a forward pass of a few images. The input of a map must be [images, positions,
    width], because dropout has masks only for this shape. Towers that work on windows or on feature
    maps have no such maps.
    """
    wanted = {name for each in maps for name in _MAPS[each]}
    positions = model.vision_model.positions = positions_of(model.vision_model)
    return [name for name in positions if name.rpartition(".")[2] in wanted]


@torch.inference_mode()
def positions_of(tower: ImageTower) -> dict[str, int]:
    """Return the number of positions in the input of each linear map in a layer, by the map's name
    in the tower."""
    found: dict[str, int] = {}
    hooks = []
    for name, module in tower.tower.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.(attn|token_mixer|mlp)\.\w+$", name):
            hooks.append(module.register_forward_pre_hook(_noting(f"tower.{name}", found)))
    side = tower.config.image_size
    tower(next(tower.parameters()).new_zeros(_PROBES, 3, side, side))
    for hook in hooks:
        hook.remove()
    return found


def _noting(name: str, found: dict[str, int]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].dim() == 3 and len(inputs[0]) == _PROBES:
            found[name] = inputs[0].shape[1]

    return note


def _projection_path(visual: Any) -> str:
    """Return the path of the module that maps features to embeddings, the last in a tower."""
    if len(visual.head):
        return "head"
    classifier = visual.trunk.get_classifier()
    path: str = next(name for name, module in visual.named_modules() if module is classifier)
    return path


def _blocks(visual: Any) -> Any:
    trunk = visual.trunk
    return getattr(trunk, "blocks", None) or getattr(trunk, "stages", None) or ()


def blocks_above(name: str, blocks: int) -> int:
    """Count the blocks from a parameter of an image tower up to the tower's end."""
    if inside := re.search(r"\.(?:blocks|stages)\.(\d+)\.", name):
        return blocks - int(inside.group(1))
    below = ("patch_embed", "pos_embed", "cls_token", "reg_token", "stem", "norm_pre")
    return blocks + 1 if any(part in name for part in below) else 0
