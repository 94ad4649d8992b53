"""May this run go on from that checkpoint? And what it then finds in its folder."""

import shutil
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.core.files import disk_error
from clipft.config.settings import Settings, fixed_on_resume
from clipft.runs.checkpoint import check_resumable, previous_of
from clipft.training.checkpoint_pair import Whole, newest_whole, put_back, there_is_one
from clipft.training.plan import Note
from clipft.runs.folder import RunPaths, cut_lines
from clipft.training.setup import RunSetup


def checkpoint_to_resume(settings: Settings, paths: RunPaths, note: Note) -> Whole | None:
    """The checkpoint to go on from; None: start from scratch. Nothing is changed.

    Raises:
        ModelError: one is there but none can be gone on from.
        UsageError: a setting that decides the weights was changed.
    """
    if not settings.resume_from_checkpoint:
        return None
    if not there_is_one(paths.checkpoint):
        note(f"warning: no checkpoint {paths.checkpoint}: starting at epoch 0.")
        return None
    whole = newest_whole(paths.checkpoint)
    check_resumable(whole.path, whole.content)
    _refuse_changes(whole.content["settings"], settings)
    return whole


def go_back_to(whole: Whole, checkpoint: Path, note: Note) -> None:
    """Where the newest is damaged, the one before it takes its place."""
    if not whole.damage:
        return
    aside = put_back(checkpoint)
    kept = f"; the damaged one is now {aside}" if aside else ""
    step = whole.content.get("step", 0)
    note(f"warning: {whole.damage.message}; going on from the one before it, of step {step}{kept}.")


def set_aside(paths: RunPaths, note: Note) -> None:
    """What an earlier run left is not of the one that starts from scratch. Where it has weights,
    all of it is kept in a folder of its own.

    Raises:
        StorageError: the disk refuses.
    """
    checkpoints = (paths.checkpoint, previous_of(paths.checkpoint))
    there = [path for path in (*checkpoints, *paths.contents) if path.exists()]
    if not {*checkpoints, paths.best}.intersection(there):
        for path in there:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        return
    kept = paths.earlier()
    try:
        kept.mkdir()
        for path in there:
            path.replace(kept / path.name)
    except OSError as error:
        raise disk_error(kept, error) from error
    note(f"The earlier run in {paths.folder} is kept as {kept}.")


def cut_back(paths: RunPaths, checkpoint: dict[str, Any]) -> None:
    """Lines of what came after the checkpoint are written again."""
    epochs = checkpoint["epoch"] - (not checkpoint.get("validated", True))
    for path in (paths.metrics, paths.skipped):
        cut_lines(path, checkpoint["step"], epochs)


def check_same_run(checkpoint: dict[str, Any], setup: RunSetup) -> None:
    """
    Raises:
        UsageError: another base model, or other training pairs.
    """
    theirs, ours = checkpoint["base_model"], setup.loaded.identity
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise UsageError(
            f"the checkpoint was trained from other weights: {theirs['name']} "
            f"({theirs['fingerprint'][:8]}) against {ours['name']} ({ours['fingerprint'][:8]})",
            "resume with the base model it started from",
        )
    if checkpoint["data"] != setup.train.identity():
        raise UsageError(
            f"the training shards in {setup.settings.data_dir} are not those of the checkpoint",
            "name the folder with the same shards with --data-dir, or start a new run",
        )


def _refuse_changes(saved: dict[str, Any], settings: Settings) -> None:
    now = settings.model_dump(mode="json")
    changed = [name for name in fixed_on_resume() if name in saved and saved[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} {saved[name]} -> {now[name]}" for name in changed)
        raise UsageError(
            f"these settings decide the weights and cannot change on resume: {listed}",
            "set them back, or start a new run with another --output-dir",
        )
