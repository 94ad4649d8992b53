"""Turns a pretrained model into one that trains as a scenario declares."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipft.config.scenarios import TEXTUAL, VISUAL, Scenario
from clipft.config.sections.model import AdaptSettings, ModelSettings
from clipft.core.errors import ModelError
from clipft.models.adapters import without_bitsandbytes
from clipft.models.complete import check_finite
from clipft.models.fast_encoder import check_attention, use_fast_activations
from clipft.models.pretrained import PretrainedModel

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": _ATTENTION,
    "mlp": _MLP,
    "all": (*_ATTENTION, *_MLP),
}
"""Linear maps of an encoder layer that get adapters, by their names in CLIP."""

SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
"""Temperature and bias at which the sigmoid loss starts (Zhai et al. 2023)."""


@dataclass(frozen=True)
class Parameters:
    """The number of parameters in the pretrained model, and of trainable ones (with adapters)."""

    base: int
    trainable: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.base
        return f"training {self.trainable:,} parameters, {share:.3f}% of the model's {self.base:,}"


class TrainableModel(nn.Module):
    """CLIP prepared for a scenario. It takes uint8 pixels and token ids; returns unit embeddings.

    Images are [B, 3, S, S], or strips of patches as described in ``Patches``.

    A tower is trainable if any weights of its encoder are. ``images_trainable`` is also true if
    only the image projection is trainable, because image embeddings then change in training.
    """

    clip: Any
    _gain: Tensor
    _shift: Tensor

    def __init__(self, base: PretrainedModel, clip: nn.Module) -> None:
        super().__init__()
        check_attention(clip)
        self.clip = clip
        use_fast_activations(clip)
        self.architecture = base.architecture
        self._most_patches = base.inputs.patches.most if base.inputs.patches else 0
        self._base_count = base.parameters_count
        parts = {self.part_of(name) for name, _ in self.trainable()}
        self.vision_tower_trainable = "vision" in parts
        self.text_tower_trainable = "text" in parts
        self.images_trainable = self.vision_tower_trainable or VISUAL in parts
        self.texts_trainable = self.text_tower_trainable or TEXTUAL in parts
        # For pixels in 0..255: (x / 255 - mean) / std as one fused multiplication and addition
        std = torch.tensor(base.inputs.std).view(1, 3, 1, 1)
        mean = torch.tensor(base.inputs.mean).view(1, 3, 1, 1)
        self.register_buffer("_gain", 1 / (255 * std), persistent=False)
        self.register_buffer("_shift", -mean / std, persistent=False)

    @property
    def embedding_size(self) -> int:
        """The number of dimensions of the embeddings."""
        return self.architecture.embedding_size(self.clip)

    @property
    def image_positions(self) -> int:
        """The number of positions of an image in the vision tower."""
        return self._most_patches or self.architecture.image_positions(self.clip)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower up to its projection: images of the loader, uint8 -> [B, W]."""
        return self.architecture.pixel_features(self.clip, pixel_values, self._normalize)

    def _normalize(self, pixel_values: Tensor) -> Tensor:
        return torch.addcmul(self._shift, pixel_values.float(), self._gain)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Run the text tower up to its projection: int64 [B, T] -> [B, W]."""
        return self.architecture.text_features(self.clip, input_ids)

    def project_images(self, features: Tensor) -> Tensor:
        """Project ``image_features`` to float32 [B, D] of unit length."""
        projected = self.architecture.project_images(self.clip, features)
        return functional.normalize(projected.float(), dim=-1)

    def project_texts(self, features: Tensor) -> Tensor:
        """Project ``text_features`` to float32 [B, D] of unit length."""
        projected = self.architecture.project_texts(self.clip, features)
        return functional.normalize(projected.float(), dim=-1)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Embed images of the loader, uint8 -> float32 [B, D] of unit length."""
        return self.project_images(self.image_features(pixel_values))

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """Embed texts: int64 [B, T] -> float32 [B, D] of unit length."""
        return self.project_texts(self.text_features(input_ids))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_images(pixel_values), self.encode_texts(input_ids)

    @property
    def logit_scale(self) -> Tensor:
        """The temperature as the natural logarithm that CLIP stores; a scalar."""
        scale: Tensor = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """The bias that the sigmoid loss adds to the logits, a scalar; None without one."""
        bias: Tensor | None = getattr(self.clip, "logit_bias", None)
        return bias

    def clamp_logit_scale(self) -> None:
        """Limit a trainable temperature to that of its family: 100 for CLIP, as its authors do.

        A frozen temperature does not change, because no checkpoint contains it.
        """
        if self.logit_scale.requires_grad:
            with torch.no_grad():
                self.logit_scale.clamp_(max=self.architecture.max_logit_scale)

    def part_of(self, name: str) -> str:
        """Return the part that a parameter belongs to: ``vision`` or ``text`` for a tower, the
        name of a projection, or ``scale`` for temperature and bias."""
        for projection, path in self.architecture.projections.items():
            if f"{path}." in name:
                return projection
        towers = (tower for tower in ("vision", "text") if f"{tower}_model." in name)
        return next(towers, "scale")

    def layers_above(self, name: str) -> int:
        """Count the encoder layers from a parameter up to the end of its tower.

        The result is 0 for parameters after the encoder and for the temperature, and one more than
        the number of layers for the token and patch embeddings.
        """
        part = self.part_of(name)
        if part not in {"vision", "text"}:
            return 0
        return self.architecture.layers_above(self.clip, name, part)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and trainable parameters in a fixed order."""
        return ((n, p) for n, p in self.clip.named_parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy the trainable weights to the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Load weights that ``trainable_state`` returned.

        Raises:
            ModelError: the weights belong to another scenario, LoRA rank or model, or are not
                finite.
        """
        self.check_state(state)
        with torch.no_grad():
            for name, parameter in self.trainable():
                parameter.copy_(state[name])

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Check that weights have the names and shapes of this model's and are finite.

        Raises:
            ModelError: the weights belong to another scenario, LoRA rank or model, or to a run that
                diverged.
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
        check_finite("the checkpoint", state.items())

    def parameters_count(self) -> Parameters:
        return Parameters(self._base_count, sum(p.numel() for _, p in self.trainable()))


def adapt(base: PretrainedModel, scenario: Scenario, settings: AdaptSettings) -> TrainableModel:
    """Freeze a model, add adapters, and unfreeze what ``scenario`` declares.

    ``base.model`` is changed and must not be used afterwards.

    Raises:
        ModelError: the scenario's adapters or projections match no module of this model.
    """
    clip = base.model
    clip.requires_grad_(scenario.full)
    _remove_dropout(clip)
    bias_added = settings.loss == "siglip" and getattr(clip, "logit_bias", None) is None
    if bias_added:
        # CLIP's own temperature of 100 would classify nearly all negatives as positives, and push
        # the towers apart before any bias could compensate, so the temperature is reset as well
        clip.logit_bias = nn.Parameter(torch.full_like(clip.logit_scale, SIGLIP_BIAS))
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(SIGLIP_SCALE))
    paths = [base.architecture.projections[name] for name in scenario.projections]
    modules = {name for name, _ in clip.named_modules()}
    for path in paths:
        if path not in modules:
            raise ModelError(
                f"{base.name} has no {path}, which {scenario.name} trains",
                "choose another scenario or base model",
            )
    if scenario.lora:
        clip = _add_lora(base, scenario, paths, settings)  # PEFT trains copies of the projections
    else:
        for path in paths:
            clip.get_submodule(path).requires_grad_(True)
    model = TrainableModel(base, clip)
    train_scale = settings.logit_scale == "trained"
    if settings.logit_scale == "auto":
        # If the sigmoid loss starts with a new bias, temperature and bias must be trained
        train_scale = scenario.full or (scenario.trains and bias_added)
    for value in (model.logit_scale, model.logit_bias):
        if value is not None:
            value.requires_grad_(train_scale)
    return model


def _remove_dropout(clip: nn.Module) -> None:
    """Turn off a model's own dropout, whose masks would not depend on the row alone.

    Only text towers that are a BERT were pretrained with dropout.
    """
    for module in clip.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@without_bitsandbytes()
def _add_lora(
    base: PretrainedModel, scenario: Scenario, projections: list[str], settings: ModelSettings
) -> Any:
    """Add adapters to the encoders of a scenario, and make ``projections`` trainable as a whole.

    ``pissa`` and ``olora`` subtract the adapters' initial product from the base weights. This is
    repeated whenever the model is loaded, and gives the same result, because the product of the
    leading parts of an SVD or QR does not depend on their signs, which differ between machines.

    Raises:
        ModelError: no module of this model matches.
    """
    from peft import LoraConfig, get_peft_model

    maps = TARGETS[settings.lora_targets]
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=base.architecture.lora_targets(base.model, scenario.lora, maps),
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
