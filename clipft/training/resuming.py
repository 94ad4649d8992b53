"""May this run go on from that checkpoint?"""

from typing import Any

from clipft.errors import UsageError
from clipft.settings import Settings, fixed_on_resume
from clipft.training.checkpoint import load_checkpoint
from clipft.training.planning import Note
from clipft.training.run_folder import RunPaths
from clipft.training.setup import RunSetup


def checkpoint_to_resume(settings: Settings, paths: RunPaths, note: Note) -> dict[str, Any] | None:
    """The checkpoint to go on from; None: start from scratch.

    Raises:
        ModelError: it is there but cannot be read.
        UsageError: a setting that decides the weights was changed.
    """
    if not settings.resume_from_checkpoint:
        return None
    if not paths.checkpoint.exists():
        note(f"warning: no checkpoint {paths.checkpoint}: starting at epoch 0.")
        return None
    checkpoint = load_checkpoint(paths.checkpoint)
    _refuse_changes(checkpoint["settings"], settings)
    return checkpoint


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
