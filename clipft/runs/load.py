"""A checkpoint -> the tuned model that it holds."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.errors import ModelError
from clipft.embedding.load import LoadedModel, load_model
from clipft.runs.checkpoint import load_checkpoint, there_is_one

CHECKPOINT_GLOB = "*_checkpoint.pt"
_PREVIOUS_GLOB = "*_checkpoint.previous.pt"


def saved_settings(content: dict[str, Any], now: LoadedSettings, anew: Collection[str]) -> Settings:
    """The settings of a checkpoint, but those named in ``anew`` as they are set now.

    Raises:
        ModelError: the checkpoint's settings are not valid ones.
    """
    current = now.values.model_dump()
    changed = {name: current[name] for name in anew if now.origins[name] != "default"}
    known = {k: v for k, v in content["settings"].items() if k in Settings.model_fields}
    try:
        return Settings(**{**known, **changed})
    except ValidationError as error:
        raise ModelError(
            f"the settings in the checkpoint are not valid: {error.errors()[0]['msg']}",
            "use another checkpoint",
        ) from error


def find_checkpoint(place: Path | None, settings: Settings) -> Path:
    """The weights to evaluate: a file as it is; a run folder's best; else the settings' run.

    Raises:
        ModelError: none is there.
    """
    if place is not None and place.is_file():
        return place
    folder = place if place is not None else settings.run_dir
    beside = folder.with_name(f"{folder.name}_checkpoint.pt")
    candidates = [folder / "best.pt", beside, *sorted(folder.glob(CHECKPOINT_GLOB))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        f"no checkpoint in {folder}", "name a checkpoint or a run folder, or run `clipft train`"
    )


def resumable_checkpoint(place: Path | None, output_dir: Path) -> Path:
    """A file as it is; a run folder's own checkpoint; else the newest in a folder of runs.

    Raises:
        ModelError: none is there.
    """
    if place is None:
        return newest_checkpoint(output_dir)
    own = place.with_name(f"{place.name}_checkpoint.pt")
    if not place.is_dir():
        return place
    return own if there_is_one(own) else newest_checkpoint(place)


def newest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint written last in a folder of runs; where only the one before it is left,
    the path that it had.

    Raises:
        ModelError: there is none.
    """
    found = sorted(output_dir.glob(CHECKPOINT_GLOB), key=lambda path: path.stat().st_mtime)
    if not found:
        left = sorted(output_dir.glob(_PREVIOUS_GLOB), key=lambda path: path.stat().st_mtime)
        found = [path.with_name(path.name.replace(".previous.pt", ".pt")) for path in left]
    if not found:
        raise ModelError(
            f"no *_checkpoint.pt in {output_dir}",
            "name a checkpoint, or set --output-dir to the folder of the run",
        )
    return found[-1]


def load_tuned(content: dict[str, Any], settings: Settings) -> LoadedModel:
    """The model of a checkpoint, with its weights.

    Raises:
        ModelError: the base model is not the one it was trained from.
    """
    loaded = load_model(settings)
    theirs = content["base_model"]
    if theirs["fingerprint"] != loaded.fingerprint:
        raise ModelError(
            f"the checkpoint was trained from other weights: {theirs['name']} "
            f"({theirs['fingerprint'][:8]}) against {settings.model} ({loaded.fingerprint[:8]})",
            "name the base model it was trained from with --model",
        )
    loaded.model.load_trainable_state(content["model_state_dict"])
    return loaded


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
