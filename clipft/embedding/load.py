"""Loads a model ready for use: adapted to its scenario, on its device, in its precision."""

from dataclasses import dataclass

import torch

from clipft.config.settings import Settings
from clipft.core.common import Note
from clipft.models.device import (
    Precision,
    cast_frozen_weights,
    choose_device,
    choose_precision,
    compute_fp32_exactly,
)
from clipft.models.dropout import RowMasks
from clipft.models.lora import use_fast_adapters
from clipft.models.pretrained import PretrainedModel, load_pretrained
from clipft.models.trainable import TrainableModel, adapt


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model, adapted to the scenario of some settings, on its device.

    ``image_masks`` and ``text_masks`` are the dropout masks of each tower's adapters; None without
    dropout.
    """

    base: PretrainedModel
    fingerprint: str
    model: TrainableModel
    precision: Precision
    image_masks: RowMasks | None
    text_masks: RowMasks | None

    @property
    def identity(self) -> dict[str, str]:
        """Name and fingerprint of the pretrained model, as checkpoints record them."""
        return {"name": self.base.name, "fingerprint": self.fingerprint}


def load_model(
    settings: Settings,
    pretrained: bool = False,
    began: str = "",
    note: Note = lambda text: None,
) -> LoadedModel:
    """Load the pretrained model of ``settings``, adapted to their scenario.

    The initial values of adapters depend on the seed. With ``pretrained``, the scenario is ignored
    and the model is loaded as published. ``began`` is the precision in which a resumed run began,
    for ``choose_precision``. ``runs.load.load_fine_tuned`` also loads the weights of a checkpoint.

    Raises:
        ModelError: the model cannot be loaded, or the scenario does not fit it.
        UsageError: the device or the precision is not available.
    """
    if pretrained:
        own = {"scenario": "zero_shot", "context_length": 0, "image_size": 0}
        settings = settings.model_copy(update=own)
    choose_device(settings)  # refuse a missing device before the weights are read
    compute_fp32_exactly()
    base = load_pretrained(settings.model, settings.input_sizes)
    precision = choose_precision(settings, base.width, began, note)
    fingerprint = base.fingerprint()  # before adapt, which changes the weights
    torch.manual_seed(settings.seed)
    model = adapt(base, settings.declared_scenario, settings).to(precision.device)
    if settings.gradient_checkpointing:
        # Only the inputs of encoder layers are kept for the backward pass, in which each layer runs
        # again with the same dropout. This saves memory and costs about one forward pass.
        model.clip.gradient_checkpointing_enable({"use_reentrant": False})
    image_masks, text_masks = (
        use_fast_adapters(tower, settings.lora_dropout, precision.device)
        for tower in (model.clip.vision_model, model.clip.text_model)
    )
    cast_frozen_weights(model, precision)
    return LoadedModel(base, fingerprint, model, precision, image_masks, text_masks)
