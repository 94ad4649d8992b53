"""Defaults that depend on the catalogue and the base model, for settings that the user has not set.

A run needs a few hundred optimizer steps to learn, so a small catalogue gets a smaller effective
batch and, if that is not enough, more epochs. Early stopping then waits for more of these short
epochs. A base model may also have its own learning rates, in the file ``clipft.json`` of its
folder.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipft.config.settings import FOLLOWING, Settings
from clipft.config.sources import LoadedSettings, option_of
from clipft.core.common import Note, counted
from clipft.data.few_shot import training_pairs
from clipft.data.order import EpochPlan
from clipft.distributed.collectives import ALONE, Processes
from clipft.distributed.rank_zero import on_rank_zero
from clipft.models.source import own_learning_rates
from clipft.runs.folder import RunPaths, run_settings

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

ENOUGH_STEPS = 300
"""Optimizer steps that a run should have."""
SMALLEST_BATCH = 32
"""The smallest effective batch that is chosen. A smaller batch has too few negatives."""
MOST_EPOCHS = 100
PATIENT_STEPS = ENOUGH_STEPS // 2
"""A run is not stopped before about this many steps without improvement, even with short epochs."""


def follow_catalogue(
    loaded: LoadedSettings,
    note: Note,
    processes: Processes = ALONE,
    source: "ShardSource | None" = None,
) -> LoadedSettings:
    """Replace defaults by values that suit the training pairs and the base model.

    Values that the user has set do not change, and a resumed run keeps its earlier values. ``note``
    receives a sentence about the chosen values. ``source`` gives the training shards of a stream if
    they are not in ``data_dir``.

    Raises:
        DataError: there are no training pairs.
    """
    settings = loaded.values
    free = {name for name in FOLLOWING if loaded.is_default(name)}
    if not free or not settings.declared_scenario.trains:
        return loaded
    # Only rank zero, because other machines may not have the folder of the run
    chosen, said = on_rank_zero(processes, lambda: _choose(settings, free, source))
    if said:
        note(said)
    values = {name: value for name, (value, _) in chosen.items()}
    origins = {name: origin for name, (_, origin) in chosen.items()}
    return replace(
        loaded, values=settings.model_copy(update=values), origins=loaded.origins | origins
    )


def _choose(
    settings: Settings, free: set[str], source: "ShardSource | None"
) -> tuple[dict[str, tuple[Any, str]], str]:
    """Return values by name, each with its origin, and a sentence about the changed values."""
    paths = RunPaths(settings.run_dir)
    left = (paths.checkpoint, paths.settings, paths.metrics)
    if settings.resume_from_checkpoint and all(path.exists() for path in left):
        began = run_settings(paths.folder)
        return {name: (getattr(began, name), "run") for name in free}, ""
    chosen: dict[str, tuple[Any, str]] = {}
    rates = own_learning_rates(settings.model)
    if "lr" in free and settings.scenario in rates:
        chosen["lr"] = rates[settings.scenario], f"model {settings.model}"
    pairs = count_training_pairs(settings, source)
    suited = steps_for(settings, pairs, free)
    changed = {name: value for name, value in suited.items() if value != getattr(settings, name)}
    if not changed:
        return chosen, ""
    *others, last = (f"{option_of(name)} {value}" for name, value in changed.items())
    options = f"{', '.join(others)} and {last}" if others else last
    steps = _steps(pairs, suited["effective_batch_size"]) * suited["epochs"]
    return chosen | {name: (value, "catalogue") for name, value in changed.items()}, (
        f"note: for {counted(pairs, 'training pair')}, this run uses {options} "
        f"({counted(steps, 'step')} in all). Set these options to choose yourself."
    )


def count_training_pairs(settings: Settings, source: "ShardSource | None" = None) -> int:
    """Count the training pairs of ``data_dir`` or, if given, of ``source``.

    Raises:
        DataError: there are no pairs.
    """
    folder = settings.data_dir / "train"
    if not settings.stream:
        return len(training_pairs(settings))
    from clipft.data.shards.stream import open_stream  # webdataset is slow to import

    return len(open_stream(source or folder, settings.shuffle_buffer, settings.max_train_pairs))


def steps_for(settings: Settings, pairs: int, free: set[str]) -> dict[str, int]:
    """Choose the effective batch, epochs and patience for ``pairs``. Only ``free`` settings change.

    The effective batch is halved first, until there are ``ENOUGH_STEPS``. Epochs are raised if the
    smallest batch does not give enough steps, and patience if its epochs have fewer than
    ``PATIENT_STEPS``.
    """
    batch, epochs, patience = settings.effective_batch_size, settings.epochs, settings.patience
    if "effective_batch_size" in free:
        while batch > SMALLEST_BATCH and _steps(pairs, batch) * epochs < ENOUGH_STEPS:
            batch //= 2
    per_epoch = _steps(pairs, batch)
    if "epochs" in free:
        epochs = max(epochs, min(MOST_EPOCHS, -(-ENOUGH_STEPS // per_epoch)))
    if "patience" in free and settings.stop_on != "never":
        patience = max(patience, min(epochs, PATIENT_STEPS // per_epoch))
    return {"effective_batch_size": batch, "epochs": epochs, "patience": patience}


def _steps(pairs: int, batch: int) -> int:
    """The optimizer steps of an epoch."""
    return EpochPlan(pairs, min(batch, pairs), min(batch, pairs), seed=0).steps
