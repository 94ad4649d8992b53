"""A model by whatever name people have for it: a run, a checkpoint, a folder, a hub id."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.runs.checkpoint import load_checkpoint
from clipft.embedding.load import LoadedModel, load_model
from clipft.runs.load import find_checkpoint, load_tuned, saved_settings


@dataclass(frozen=True)
class OpenedModel:
    """``content`` and ``checkpoint`` are None where the model is an untouched one."""

    loaded: LoadedModel
    settings: Settings
    content: dict[str, Any] | None = None
    checkpoint: Path | None = None


def open_model(place: str, now: LoadedSettings, anew: Collection[str]) -> OpenedModel:
    """The model of a checkpoint or run folder, with the settings it was trained with but those
    in ``anew``; or the untouched model of a folder of transformers, a hub id, or ``tiny``.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    path = Path(place).expanduser()
    if _is_model_name(place, path):
        return open_untouched(now.values.model_copy(update={"model": place}))
    checkpoint = find_checkpoint(path, now.values)
    content = load_checkpoint(checkpoint)
    settings = saved_settings(content, now, anew)
    return OpenedModel(load_tuned(content, settings), settings, content, checkpoint)


def open_untouched(settings: Settings) -> OpenedModel:
    """The base model of some settings as it came."""
    settings = settings.model_copy(update={"scenario": "zero_shot"})
    return OpenedModel(load_model(settings), settings)


def _is_model_name(place: str, path: Path) -> bool:
    if path.is_dir():
        return (path / "config.json").is_file()
    looks_local = place.startswith((".", "/", "~")) or path.suffix == ".pt" or path.exists()
    return not looks_local and not path.with_name(f"{path.name}_checkpoint.pt").is_file()
