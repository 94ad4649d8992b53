"""Defaults that follow the catalogue and the base model, where the user has set nothing.

A run needs a few hundred optimizer steps to learn, so a small catalogue gets a smaller effective
batch and, where that is not enough, more epochs. A base model may also bring its own learning
rates, in the file ``clipft.json`` of its folder.
"""

from dataclasses import replace
from typing import Any

from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings
from clipft.core.common import Note, counted
from clipft.data.order import EpochPlan
from clipft.data.shards.dataset import open_pairs
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import rank_zero_first
from clipft.models.pretrained import own_learning_rates
from clipft.runs.folder import RunPaths, run_settings

ENOUGH_STEPS = 300
"""Optimizer steps that a run should have."""
SMALLEST_BATCH = 32
"""The smallest effective batch that is chosen: fewer pairs have too few negatives."""
MOST_EPOCHS = 100

_FOLLOW = ("effective_batch_size", "epochs", "lr")


def follow_catalogue(
    loaded: LoadedSettings, note: Note, processes: Processes = ALONE
) -> LoadedSettings:
    """Replace defaults by values that suit the training pairs and the base model.

    Values that were set anywhere stay as they are. A run that is resumed keeps the ones that it
    began with. ``note`` receives a sentence that says what was chosen.

    Raises:
        DataError: there are no training pairs.
    """
    settings = loaded.values
    free = {name for name in _FOLLOW if loaded.is_default(name)}
    if not free or not settings.declared_scenario.trains:
        return loaded
    paths = RunPaths(settings.run_dir)
    left = (paths.checkpoint, paths.settings, paths.metrics)
    if settings.resume_from_checkpoint and all(path.exists() for path in left):
        began = run_settings(paths.folder)
        return _with(loaded, {name: getattr(began, name) for name in free}, "run")
    rates = own_learning_rates(settings.model)
    if "lr" in free and settings.scenario in rates:
        loaded = _with(loaded, {"lr": rates[settings.scenario]}, f"model {settings.model}")
    if settings.stream:  # may be too large to be read for this
        return loaded
    folder = settings.data_dir / "train"
    pairs = rank_zero_first(processes, lambda: len(open_pairs(folder, settings.max_train_pairs)))
    chosen = {
        name: value
        for name, value in steps_for(settings, pairs, free).items()
        if value != getattr(settings, name)
    }
    if not chosen:
        return loaded
    loaded = _with(loaded, chosen, "catalogue")
    options = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    steps = _steps(pairs, loaded.values.effective_batch_size, loaded.values.epochs)
    note(
        f"note: for {counted(pairs, 'training pair')} this run uses {options}, which make "
        f"{counted(steps, 'step')}. Set these options to choose yourself."
    )
    return loaded


def steps_for(settings: Settings, pairs: int, free: set[str]) -> dict[str, Any]:
    """Choose effective batch and epochs for ``ENOUGH_STEPS`` steps, as far as they are ``free``.

    The effective batch is halved first, to a power of two. Epochs are raised where the smallest
    batch does not make enough steps.
    """
    batch, epochs = settings.effective_batch_size, settings.epochs
    if "effective_batch_size" in free:
        while batch > SMALLEST_BATCH and _steps(pairs, batch, epochs) < ENOUGH_STEPS:
            batch //= 2
    if "epochs" in free:
        enough = -(-ENOUGH_STEPS // _steps(pairs, batch, epochs=1))
        epochs = max(epochs, min(MOST_EPOCHS, enough))
    return {"effective_batch_size": batch, "epochs": epochs}


def _steps(pairs: int, batch: int, epochs: int) -> int:
    return EpochPlan(pairs, min(batch, pairs), min(batch, pairs), seed=0).steps * epochs


def _with(loaded: LoadedSettings, values: dict[str, Any], origin: str) -> LoadedSettings:
    return replace(
        loaded,
        values=loaded.values.model_copy(update=values),
        origins={**loaded.origins, **dict.fromkeys(values, origin)},
    )
