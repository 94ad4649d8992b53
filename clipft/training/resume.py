"""Checks and cleanup before a run is resumed: the checkpoint that it may continue from, and the
files in its folder that stay."""

import shutil
from typing import Any

from clipft.config.settings import Settings
from clipft.core.common import Note
from clipft.core.errors import UsageError
from clipft.core.files import disk_error
from clipft.runs.checkpoint import (
    NewestCheckpoint,
    check_base_model,
    check_unchanged,
    checkpoint_exists,
    load_newest,
    previous_of,
    restore_previous,
)
from clipft.runs.folder import RunPaths, cut_lines
from clipft.training.setup import RunSetup


def checkpoint_to_resume(
    settings: Settings, paths: RunPaths, note: Note
) -> NewestCheckpoint | None:
    """Return the checkpoint to resume from, or None to start from scratch. No file is changed.

    Raises:
        ModelError: there are checkpoints, but none of them can be resumed from.
        UsageError: a setting that affects the weights was changed.
    """
    if not settings.resume_from_checkpoint:
        return None
    if not checkpoint_exists(paths.checkpoint):
        note(f"warning: no checkpoint {paths.checkpoint}: starting at epoch 0.")
        return None
    whole = load_newest(paths.checkpoint)
    check_unchanged(whole, settings)
    return whole


def replace_damaged(whole: NewestCheckpoint, paths: RunPaths, note: Note) -> None:
    """If the newest checkpoint is damaged, replace it by the one before it."""
    if not whole.damage:
        return
    aside = restore_previous(paths.checkpoint)
    kept = f"; the damaged one is now {aside}" if aside else ""
    step = whole.content.get("step", 0)
    note(f"warning: {whole.damage.message}; resuming from the one before it, of step {step}{kept}.")


def check_same_run(checkpoint: dict[str, Any], setup: RunSetup) -> None:
    """Check that the checkpoint belongs to the model and the pairs of this run.

    Raises:
        UsageError: it was trained from another base model or on other pairs.
    """
    check_base_model(checkpoint, setup.loaded.identity, UsageError)
    if checkpoint["data"] != setup.train.identity():
        raise UsageError(
            f"the training shards in {setup.settings.data_dir} are not those of the checkpoint",
            "name the folder with the same shards with --data-dir, or start a new run",
        )
    if checkpoint.get("general_data", "") != setup.held.identity:
        raise UsageError(
            f"--preserve-data {setup.settings.preserve_data or 'none'} is not the general set of "
            "the checkpoint",
            "name the folder with the same shards with --preserve-data, or start a new run",
        )


def drop_later_lines(paths: RunPaths, checkpoint: dict[str, Any]) -> None:
    """Remove the lines of later steps than the checkpoint; the resumed run writes them again."""
    epochs = checkpoint["epoch"] - (not checkpoint.get("validated", True))
    for path in (paths.metrics, paths.skipped):
        cut_lines(path, checkpoint["step"], epochs)


def set_aside(paths: RunPaths, note: Note) -> None:
    """Remove the files of an earlier run from the folder, for a run that starts from scratch.

    If the earlier run left weights, all of its files are moved to a separate folder.

    Raises:
        StorageError: the files cannot be moved.
    """
    checkpoints = (paths.checkpoint, previous_of(paths.checkpoint))
    there = [path for path in (*checkpoints, *paths.contents()) if path.exists()]
    if not {*checkpoints, paths.best}.intersection(there):
        for path in there:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        return
    kept = paths.unused_earlier()
    try:
        kept.mkdir()
        for path in there:
            path.replace(kept / path.name)
    except OSError as error:
        raise disk_error(kept, error) from error
    note(f"The earlier run in {paths.folder} is kept as {kept}.")
