"""Finds the model that a command is given: a checkpoint, a run folder or a pretrained model.

This module does not import torch, so that a wrong name is refused at once.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clipft.config.fields import current_names
from clipft.config.scenarios import CHECKPOINT_SUFFIX
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.common import expand_home
from clipft.core.errors import ModelError, sentences
from clipft.core.files import did_you_mean_path
from clipft.models.open_clip.names import names_weights
from clipft.models.source import ADAPTER_CONFIG, check_model, looks_local
from clipft.runs.checkpoint import checkpoint_exists, previous_of
from clipft.runs.folder import RunPaths


def named_checkpoint(place: str | None, settings: Settings) -> Path | None:
    """Find the checkpoint that a place names; None if it is a pretrained model.

    Args:
        place: a checkpoint or run folder; or a pretrained model: a folder of transformers, a hub
            id, a name in open_clip's notation, or ``tiny``. None is the pretrained model of the
            settings.
        settings: the settings of the command.

    Raises:
        ModelError: it looks like the path of a checkpoint, and there is none.
    """
    if place and place.startswith("~"):
        place = str(expand_home(place))
    if not place or names_weights(place):
        return None
    path = Path(place)
    if path.is_dir():
        pretrained = any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    else:  # what looks like a path is meant as a checkpoint or run folder, even if it is missing
        local = looks_local(place) or path.suffix == ".pt" or path.exists()
        pretrained = not local and not RunPaths(path).checkpoint.is_file()
    return None if pretrained else find_checkpoint(path, settings)


def pretrained_settings(place: str | None, now: LoadedSettings) -> Settings:
    """Return the settings under which a command uses the pretrained model of ``place``.

    Raises:
        ModelError: there is no such model.
    """
    model = now.values.model if place is None else place
    if model.startswith("~"):
        model = str(expand_home(model))
    try:
        check_model(model)
    except ModelError as error:
        # ``checkpoints/dual_lara`` has the form of a model on the hub
        error.hint = sentences(did_you_mean_path(Path(place)) if place else "", error.hint)
        raise
    return now.values.model_copy(update={"model": model, "scenario": "zero_shot"})


def saved_settings(content: dict[str, Any], now: LoadedSettings, anew: Collection[str]) -> Settings:
    """Return the settings in a checkpoint, except that those named in ``anew`` follow ``now``
    where the user has set them.

    Raises:
        ModelError: the checkpoint's settings are not valid.
    """
    current = now.values.model_dump()
    changed = {name: current[name] for name in anew if now.origins[name] != "default"}
    if "caption" in changed:  # other texts than those that the checkpoint drew from fields
        changed = {"fields": "", "label_prompts": "", **changed}
    saved = current_names(Settings, content["settings"])
    known = {name: value for name, value in saved.items() if name in Settings.model_fields}
    try:
        return Settings(**{**known, **changed})
    except ValidationError as error:
        raise ModelError(
            f"the settings in the checkpoint are not valid: {error.errors()[0]['msg']}",
            "use another checkpoint",
        ) from error


def find_checkpoint(place: Path | None, settings: Settings) -> Path:
    """Find the weights to evaluate: ``place`` itself if it is a file, else the best or newest
    checkpoint of that run folder, or of the run that ``settings`` describe.

    Raises:
        ModelError: there is no checkpoint.
    """
    if place is not None and place.is_file():
        return place
    folder = place if place is not None else settings.run_dir
    paths = RunPaths(folder)
    within = sorted(folder.glob(f"*{CHECKPOINT_SUFFIX}"))
    candidates = [paths.best, paths.checkpoint, *within]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        f"no checkpoint in {folder}",
        did_you_mean_path(folder)
        or "name a checkpoint or a run folder, or make one with `clipft train`",
    )


def resumable_checkpoint(place: Path | None, output_dir: Path) -> Path:
    """Find the checkpoint to resume from: ``place`` itself if it is a file, else the checkpoint
    of that run folder, else the one that was written last in a folder of runs.

    If only the checkpoint before it exists, the path of the missing checkpoint is returned.

    Raises:
        ModelError: there is no checkpoint.
    """
    if place is not None:
        own = RunPaths(place).checkpoint
        if not place.is_dir():
            return place
        if checkpoint_exists(own):
            return own
    folder, name = place or output_dir, f"*{CHECKPOINT_SUFFIX}"
    found = sorted(folder.glob(name), key=lambda path: path.stat().st_mtime)
    if not found:
        previous = previous_of(Path(name)).name
        left = sorted(folder.glob(previous), key=lambda path: path.stat().st_mtime)
        found = [path.with_name(path.name.replace(".previous.pt", ".pt")) for path in left]
    if not found:
        raise ModelError(
            f"no {name} in {folder}",
            did_you_mean_path(folder)
            or "name a checkpoint, or set --output-dir to the folder with the runs",
        )
    return found[-1]
