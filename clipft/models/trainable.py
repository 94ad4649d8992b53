"""A base model + a declared scenario -> a trainable model."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.config.scenarios import TEXTUAL, VISUAL, Scenario
from clipft.config.settings import AdaptSettings, ModelSettings
from clipft.core.errors import ModelError
from clipft.models.fast_encoder import lean_activations
from clipft.models.pretrained import BaseModel

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": _ATTENTION,
    "mlp": _MLP,
    "all": (*_ATTENTION, *_MLP),
}
"""Linear maps of an encoder layer, by the names that CLIP and SigLIP share."""


def with_lora(
    base: BaseModel, towers: Sequence[str], projections: list[str], settings: ModelSettings
) -> Any:
    """Adapters in the encoders of ``towers``, and ``projections`` trained whole; all else frozen.

    ``pissa`` and ``olora`` take the adapters' first product out of the base weights. That is
    done anew whenever the model is loaded: the product of an SVD's or QR's leading parts does
    not depend on the signs, which machines choose differently.

    Raises:
        ModelError: nothing there to adapt.
    """
    from peft import LoraConfig, get_peft_model

    which = "|".join(f"{tower}_model" for tower in towers)
    maps = TARGETS[settings.lora_targets]
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=rf".*({which})\.encoder\.layers\..*\.({'|'.join(maps)})",
        modules_to_save=projections,
        use_rslora=settings.lora_rslora,
        use_dora=settings.lora_dora,
        init_lora_weights=True if settings.lora_init == "default" else settings.lora_init,
    )
    try:
        return get_peft_model(base.model, config)
    except ValueError as error:
        raise ModelError(
            f"cannot adapt {base.name}: {error}",
            f"choose a checkpoint whose encoders have {', '.join(maps)}, or other --lora-... "
            "settings",
        ) from error


SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class Parameters:
    """Weights of the base model, and how many learn (adapters' own weights included)."""

    base: int
    trainable: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.base
        return f"{self.trainable:,} parameters train, {share:.3f} % of the base's {self.base:,}"


class TrainableModel(nn.Module):
    """CLIP under a scenario. Takes uint8 pixels and token ids, gives unit embeddings."""

    clip: Any
    _gain: Tensor
    _shift: Tensor

    def __init__(self, base: BaseModel, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        lean_activations(clip)
        self.architecture = base.architecture
        self._base_count = base.parameters_count
        learning = {self.part_of(name) for name, _ in self.trainable()}
        self.vision_tower_trainable, self.text_tower_trainable = (
            "vision" in learning,
            "text" in learning,
        )
        self.learns_images = self.vision_tower_trainable or VISUAL in learning
        self.learns_texts = self.text_tower_trainable or TEXTUAL in learning
        # Pixels 0..255: (x / 255 - mean) / std in one multiply and add
        std = torch.tensor(base.inputs.std).view(1, 3, 1, 1)
        mean = torch.tensor(base.inputs.mean).view(1, 3, 1, 1)
        self.register_buffer("_gain", 1 / (255 * std), persistent=False)
        self.register_buffer("_shift", mean / std, persistent=False)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, W]: the vision tower, up to its projection."""
        pixels = pixel_values.float() * self._gain - self._shift
        return self.architecture.image_features(self.clip, pixels)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """int64 [B, T] -> [B, W]: the text tower, up to its projection."""
        return self.architecture.text_features(self.clip, input_ids)

    def project_images(self, features: Tensor) -> Tensor:
        """What ``image_features`` gave -> float32 [B, D] of unit length."""
        projected = self.architecture.project_images(self.clip, features)
        return functional.normalize(projected.float(), dim=-1)

    def project_texts(self, features: Tensor) -> Tensor:
        """What ``text_features`` gave -> float32 [B, D] of unit length."""
        projected = self.architecture.project_texts(self.clip, features)
        return functional.normalize(projected.float(), dim=-1)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, D] of unit length."""
        return self.project_images(self.image_features(pixel_values))

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """int64 [B, T] -> float32 [B, D] of unit length."""
        return self.project_texts(self.text_features(input_ids))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both encodings."""
        return self.encode_images(pixel_values), self.encode_texts(input_ids)

    @property
    def logit_scale(self) -> Tensor:
        """The temperature, as the natural logarithm that CLIP stores; one value."""
        scale: Tensor = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What the sigmoid loss adds to the logits; one value."""
        bias: Tensor | None = getattr(self.clip, "logit_bias", None)
        return bias

    def train_logit_scale(self, learns: bool) -> None:
        """Whether the temperature, and the bias where there is one, learn."""
        for value in (self.logit_scale, self.logit_bias):
            if value is not None:
                value.requires_grad_(learns)

    def checkpoint_gradients(self) -> None:
        """Keep only the encoder layers' inputs for the backward pass, which runs each layer
        again, with the dropout it had: less memory, one more forward pass. Only in training."""
        self.clip.gradient_checkpointing_enable({"use_reentrant": False})

    def clamp_logit_scale(self) -> None:
        """Keep the scale of a CLIP at or below 100, as its authors do."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.architecture.max_logit_scale)

    def part_of(self, name: str) -> str:
        """Of a parameter: ``vision`` or ``text`` tower, a projection's name, or ``scale``."""
        for projection, path in self.architecture.projections.items():
            if f"{path}." in name:
                return projection
        towers = (tower for tower in ("vision", "text") if f"{tower}_model." in name)
        return next(towers, "scale")

    def layers_above(self, name: str) -> int:
        """Of a parameter: how many layers of its tower stand between it and the embedding;
        0 for what follows the encoder, and for the temperature."""
        part = self.part_of(name)
        if part not in {"vision", "text"}:
            return 0
        layers: int = getattr(self.clip.config, f"{part}_config").num_hidden_layers
        if inside := re.search(r"\.encoder\.layers\.(\d+)\.", name):
            return layers - int(inside.group(1))
        below = ".embeddings." in name or ".pre_layrnorm." in name
        return layers + 1 if below else 0

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that learn, in a fixed order."""
        return ((n, p) for n, p in self.clip.named_parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """A copy of what learns, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back what ``trainable_state`` gave.

        Raises:
            ModelError: as ``check_state``.
        """
        self.check_state(state)
        with torch.no_grad():
            for name, parameter in self.trainable():
                parameter.copy_(state[name])

    def check_state(self, state: dict[str, Tensor]) -> None:
        """
        Raises:
            ModelError: other names or shapes: a checkpoint of another scenario or rank.
        """
        own = dict(self.trainable())
        wrong = sorted(set(own) ^ set(state))
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise ModelError(
                f"the checkpoint does not fit the model: {len(wrong)} of {len(own)} weights "
                f"differ, first {wrong[0]}",
                "use the scenario, lora_r and model with which it was trained",
            )

    def parameters_count(self) -> Parameters:
        return Parameters(self._base_count, sum(p.numel() for _, p in self.trainable()))


def adapt(base: BaseModel, scenario: Scenario, settings: AdaptSettings) -> TrainableModel:
    """Freeze, adapt and unfreeze as ``scenario`` declares. ``base.model`` is used up.

    Raises:
        ModelError: the scenario's adapters or projections match no module of this model.
    """
    clip = base.model
    clip.requires_grad_(scenario.full)
    learns_anew = settings.loss == "siglip" and _give_bias(clip)
    paths = _projection_paths(base, scenario)
    if scenario.lora:
        clip = with_lora(base, scenario.lora, paths, settings)
    for path in () if scenario.lora else paths:
        clip.get_submodule(path).requires_grad_(True)
    model = TrainableModel(base, clip)
    wanted = scenario.full or (scenario.trains and learns_anew)
    model.train_logit_scale(
        wanted if settings.logit_scale == "auto" else settings.logit_scale == "trained"
    )
    return model


def _give_bias(clip: Any) -> bool:
    """Make a checkpoint without a bias ready for the sigmoid loss; False: it has one.

    Temperature and bias start as Zhai et al. (2023) have it. CLIP's own temperature of 100
    would take nearly all negatives for positives, and push the towers apart before any bias
    could make up for it.
    """
    if getattr(clip, "logit_bias", None) is not None:
        return False
    clip.logit_bias = nn.Parameter(torch.full_like(clip.logit_scale, SIGLIP_BIAS))
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(SIGLIP_SCALE))
    return True


def _projection_paths(base: BaseModel, scenario: Scenario) -> list[str]:
    """
    Raises:
        ModelError: this model has none there.
    """
    paths = [base.architecture.projections[name] for name in scenario.projections]
    there = {name for name, _ in base.model.named_modules()}
    for path in paths:
        if path not in there:
            raise ModelError(
                f"{base.name} has no {path}, which {scenario.name} trains",
                "choose another scenario or base model",
            )
    return paths
