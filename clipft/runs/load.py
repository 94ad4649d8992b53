"""Finds checkpoints, and opens the models that they hold.

Each loader builds on the one before: ``models.pretrained.load_pretrained`` loads a published
model, ``embedding.load.load_model`` adapts it to a scenario, ``load_fine_tuned`` gives it a
checkpoint's weights, and ``open_model`` chooses between these by what it is given.
"""

from collections.abc import Collection
from dataclasses import dataclass
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
from clipft.embedding.load import LoadedModel, load_model
from clipft.models.adapters import ADAPTER_CONFIG
from clipft.models.open_clip.names import names_weights
from clipft.models.pretrained import looks_local
from clipft.runs.checkpoint import check_base_model, checkpoint_exists, load_checkpoint, previous_of
from clipft.runs.folder import RunPaths


def saved_settings(content: dict[str, Any], now: LoadedSettings, anew: Collection[str]) -> Settings:
    """Return the settings in a checkpoint, except that those named in ``anew`` follow ``now``
    where the user has set them.

    Raises:
        ModelError: the checkpoint's settings are not valid.
    """
    current = now.values.model_dump()
    changed = {name: current[name] for name in anew if now.origins[name] != "default"}
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

    Where only its predecessor is left, this is the path that the lost checkpoint had.

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
        place: a checkpoint or run folder; or a pretrained model: a folder of transformers, a hub
            id, a name in open_clip's notation, or ``tiny``. None is the pretrained model of the
            settings.
        now: the settings of this command.
        anew: names of settings that a fine-tuned model takes from ``now`` rather than from its
            checkpoint.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    if place and place.startswith("~"):
        place = str(expand_home(place))
    path = Path(place or "")
    if not place or names_weights(place):
        pretrained = True
    elif path.is_dir():
        pretrained = any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    else:  # what looks like a path is meant as a checkpoint or run folder, even if it is missing
        local = looks_local(place) or path.suffix == ".pt" or path.exists()
        pretrained = not local and not RunPaths(path).checkpoint.is_file()
    if pretrained:
        model = now.values.model if place is None else place
        settings = now.values.model_copy(update={"model": model, "scenario": "zero_shot"})
        try:
            return OpenedModel(load_model(settings), settings)
        except ModelError as error:
            # ``checkpoints/dual_lara`` has the form of a model on the hub
            error.hint = sentences(did_you_mean_path(path) if place else "", error.hint)
            raise
    checkpoint = find_checkpoint(path, now.values)
    content = load_checkpoint(checkpoint)
    settings = saved_settings(content, now, anew)
    return OpenedModel(load_fine_tuned(content, settings), settings, content, checkpoint)
