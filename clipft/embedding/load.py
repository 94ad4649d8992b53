"""Loading a model ready for work: under its scenario, on its device, in its numbers."""

from dataclasses import dataclass

import torch

from clipft.config.settings import Settings
from clipft.embedding.dropout import Masks, row_masks
from clipft.models.device import Precision, cast_frozen_weights, choose_precision
from clipft.models.pretrained import BaseModel, load_base
from clipft.models.trainable import TrainableModel, adapt


@dataclass(frozen=True)
class LoadedModel:
    """A base model under the scenario of some settings, on its device."""

    base: BaseModel
    fingerprint: str
    model: TrainableModel
    precision: Precision
    masks: "TowerMasks"

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.base.name, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class TowerMasks:
    """Of the adapters' dropouts; None: there are none, or torch draws them."""

    images: Masks | None
    texts: Masks | None


def load_model(settings: Settings) -> LoadedModel:
    """Load and adapt; the adapters' first values follow from the seed."""
    precision = choose_precision(settings)
    base = load_base(settings.model)
    fingerprint = base.fingerprint()
    torch.manual_seed(settings.seed)
    model = adapt(base, settings.declared_scenario, settings).to(precision.device)
    if settings.gradient_checkpointing:
        model.checkpoint_gradients()
    masks = (
        row_masks(tower, settings.lora_dropout, precision.device)
        for tower in (model.clip.vision_model, model.clip.text_model)
    )
    cast_frozen_weights(model, precision)
    return LoadedModel(base, fingerprint, model, precision, TowerMasks(*masks))
