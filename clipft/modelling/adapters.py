"""LoRA adapters in the towers' encoders, by PEFT."""

from collections.abc import Sequence
from typing import Any

from clipft.core.errors import ModelError
from clipft.models.pretrained import BaseModel
from clipft.config.settings import ModelSettings

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
