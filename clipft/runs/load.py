"""Opens fine-tuned and pretrained models.

Each loader builds on the one before: ``models.pretrained.load_pretrained`` loads a published
model, ``embedding.load.load_model`` adapts it to a scenario, ``load_fine_tuned`` gives it a
checkpoint's weights, and ``open_model`` chooses between these by what it is given.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.errors import ModelError
from clipft.embedding.load import LoadedModel, load_model
from clipft.runs.checkpoint import check_base_model, load_checkpoint
from clipft.runs.places import named_checkpoint, pretrained_settings, saved_settings


def load_fine_tuned(content: dict[str, Any], settings: Settings) -> LoadedModel:
    """Load the model of ``settings`` with the weights of a checkpoint.

    Raises:
        ModelError: the checkpoint was trained from another pretrained model, or its weights do
            not fit the scenario.
    """
    loaded = load_model(settings)
    check_base_model(content, loaded.identity, ModelError)
    loaded.model.load_trainable_state(content["model_state_dict"])
    return loaded


@dataclass(frozen=True)
class OpenedModel:
    """A model with its settings; ``content`` and ``checkpoint`` are None for a pretrained one."""

    loaded: LoadedModel
    settings: Settings
    content: dict[str, Any] | None = None
    checkpoint: Path | None = None


def open_model(place: str | None, now: LoadedSettings, anew: Collection[str]) -> OpenedModel:
    """Open a fine-tuned or a pretrained model.

    Args:
        place: a checkpoint, a run folder or a pretrained model, as in ``named_checkpoint``.
        now: the settings of this command.
        anew: names of settings that a fine-tuned model takes from ``now`` rather than from its
            checkpoint.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    checkpoint = named_checkpoint(place, now.values)
    if checkpoint is None:
        settings = pretrained_settings(place, now)
        return OpenedModel(load_model(settings), settings)
    content = load_checkpoint(checkpoint)
    settings = saved_settings(content, now, anew)
    return OpenedModel(load_fine_tuned(content, settings), settings, content, checkpoint)
