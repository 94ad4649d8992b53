"""A checkpoint -> the tuned model that it holds."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clipft.core.errors import ModelError
from clipft.modelling.interpolate import Interpolation
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.runs.checkpoint import save_checkpoint
from clipft.training.checkpoint_pair import there_is_one
from clipft.embedding.load import LoadedModel, load_model

CHECKPOINT_GLOB = "*_checkpoint.pt"
_PREVIOUS_GLOB = "*_checkpoint.previous.pt"
_OF_TRAINING = frozenset(
    {"optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "skipped_in_a_row"}
)


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


def interpolation_of(content: dict[str, Any], settings: Settings) -> Interpolation:
    """The way from the untouched weights to those of a checkpoint.

    Raises:
        ModelError: nothing was trained, or not so that there is a way back.
    """
    untouched = load_model(settings).model.trainable_state()
    return Interpolation(untouched, content["model_state_dict"])


def save_interpolated(path: Path, content: dict[str, Any], way: Interpolation, at: float) -> None:
    """A checkpoint of weights alone, as ``best.pt`` is, at a point of the way.

    Raises:
        StorageError: the disk is full or refuses.
    """
    kept = {key: value for key, value in content.items() if key not in _OF_TRAINING}
    # The best epoch's figures are not those of these weights, and there is nothing to go on with
    own = {"model_state_dict": way.at(at), "interpolated_at": at, "best": None, "finished": True}
    save_checkpoint(path, {**kept, **own})
