"""Checkpoints: what they contain, and the two files that make sure that one is always intact.

A checkpoint holds all that a run needs to resume, and of the model only the trained weights.
It is a ``torch.save`` zip of plain values and tensors, read with ``weights_only=True``, so nothing
in it is executed. ``checkpoint_format`` defines its bytes, and ``docs/guides/runs.md`` each key.

No random state is saved, because all random numbers depend on the seed and the position.

Next to the newest checkpoint, the run keeps the one before it (``.previous.pt``). At any time one
of the two is intact, even after a crash of the machine.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.settings import Settings, fixed_on_resume
from clipft.core.errors import ClipftError, ModelError, UsageError
from clipft.core.files import did_you_mean_path, replacing
from clipft.runs.checkpoint_format import (
    FORMAT_VERSION,
    Damaged,
    Weight,
    check_file,
    read_values,
    write_file,
)

_CHECKSUM_SINCE = 2
"""Files of this format and later end with a checksum."""

_REQUIRED: dict[str, type] = {
    "epoch": int,
    "model_state_dict": dict,
    "settings": dict,
    "base_model": dict,
    "format_version": int,
}
_REQUIRED_TO_RESUME: dict[str, type] = {
    "step": int,
    "step_in_epoch": int,
    "loss": float,
    "epoch_loss_sum": float,
    "epoch_pairs": int,
    "choices": dict,
    "optimizer_state_dict": dict,
    "scheduler_state_dict": dict,
    "scaler_state_dict": dict,
    "skipped_in_a_row": int,
    "early_stopping": dict,
    "before": dict,
    "skipped_pairs": int,
}
"""Keys that only the checkpoint of a run has; ``best.pt`` holds weights alone."""
_SINCE_FORMAT_3 = {"epoch_pairs", "choices"}


def _from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    """Count the losses of the epoch by pairs instead of by steps, and add ``choices``.

    Only a single pair was too small for a step. The precision is known if it was fp16, from the
    loss scaler, and the optimizer from its state.
    """
    known = {key: kind for key, kind in _REQUIRED_TO_RESUME.items() if key not in _SINCE_FORMAT_3}
    settings, pairs = content["settings"], content.get("train_pairs")
    batch = settings.get("effective_batch_size")
    if _missing(content, known) or not (isinstance(pairs, int) and isinstance(batch, int)):
        return content  # weights alone, or not a run of clipft: ``check_resumable`` decides
    effective = max(1, min(batch, pairs))
    done = content["step_in_epoch"]
    steps = done or max(1, -(-(pairs - 1) // effective))
    seen = min(done * effective, pairs) if done else pairs
    states = content["optimizer_state_dict"].get("state") or {}
    kinds = ["adamw" if "exp_avg" in state else "adamw8bit" for state in states.values()]
    return {
        **content,
        "epoch_loss_sum": content["epoch_loss_sum"] / steps * seen,
        "epoch_pairs": seen,
        "choices": {
            "precision": "fp16" if content["scaler_state_dict"] else "",
            "optimizer": kinds[0] if kinds else "",
            "smallest_step": 2,
        },
    }


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda content: content,  # the same keys, in a file without a checksum
    2: _from_format_2,
}
"""By format: turns its content into that of the next format."""


class DamagedCheckpoint(ModelError):
    """The file does not have the bytes that were written. The one before it may be intact."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that ``path`` is always either the old file or the new one.

    Raises:
        StorageError: The disk is full or refuses to write. The old file is unchanged.
    """
    with replacing(path) as temporary:
        write_file(temporary, content)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint. Tensors are on the CPU, and the keys are of the newest format.

    Raises:
        DamagedCheckpoint: The file was truncated or altered.
        ModelError: The file does not exist, was written by another program or a newer clipft, or
            holds anything but plain values and tensors.
    """
    import torch

    _check_exists(path)
    has_checksum = _check_bytes(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler may raise anything on foreign bytes
        raise ModelError(
            f"{path} holds code or other objects besides weights and plain values; "
            "nothing in it was executed",
            _hint(path),
        ) from error
    return _checked(path, content, torch.Tensor, has_checksum)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Check a checkpoint as far as this is possible quickly and without torch.

    Returns:
        Its content with a ``Weight`` for each tensor; empty if only torch can read it.

    Raises:
        ModelError: As for ``load_checkpoint``. Altered weights are not noticed here.
    """
    _check_exists(path)
    content = read_values(path)
    try:
        if content is not None:
            return _checked(path, content, Weight)
    except ModelError:
        _check_bytes(path)  # what is damaged is refused as damaged, whatever it looks like
        raise
    _check_bytes(path)
    return {}


def _check_exists(path: Path) -> None:
    if not path.is_file():
        hint = did_you_mean_path(path) or "check the path, or start a run with `clipft train`"
        raise ModelError(f"no checkpoint {path}", hint)


def _hint(path: Path) -> str:
    """Say what to do about a checkpoint that cannot be used."""
    previous = previous_of(path)
    if previous.is_file():
        return f"remove {path.name}: `clipft resume` then uses the one before it, {previous}"
    return "use another checkpoint, or train again"


def _check_bytes(path: Path) -> bool:
    """Check that a file is as it was written; return True if it has a checksum."""
    try:
        return check_file(path)
    except (OSError, Damaged) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}", _hint(path)) from error


def _checked(path: Path, content: Any, weight: type, has_checksum: bool = True) -> dict[str, Any]:
    """Check the content of a checkpoint, and bring it to the newest format.

    ``weight`` is the class that stands for a tensor.
    """
    foreign = ModelError(f"{path} is not a checkpoint of clipft", _hint(path))
    if not isinstance(content, dict) or _missing(content, _REQUIRED):
        raise foreign
    weights, base, version = (
        content[key] for key in ("model_state_dict", "base_model", "format_version")
    )
    named = all(isinstance(n, str) and isinstance(w, weight) for n, w in weights.items())
    known = all(isinstance(base.get(key), str) for key in ("name", "fingerprint"))
    if not named or not known or version < 1:
        raise foreign
    if version > FORMAT_VERSION:
        raise ModelError(f"{path} was written by a newer clipft", _hint(path))
    if version >= _CHECKSUM_SINCE and not has_checksum:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is missing", _hint(path))
    current: dict[str, Any] = content
    for older in range(version, FORMAT_VERSION):
        current = _MIGRATIONS[older](current)
    return current


def check_resumable(path: Path, content: dict[str, Any]) -> None:
    """Check that a checkpoint holds the state of a run.

    Raises:
        ModelError: It holds weights alone, as ``best.pt`` does.
    """
    # A run that is still at step 0 has measured the pretrained model and nothing else
    needed: dict[str, type] = _REQUIRED_TO_RESUME if content.get("step") else {"before": dict}
    if missing := _missing(content, needed):
        raise ModelError(
            f"{path} holds weights but no run to resume: it has no {', '.join(missing)}",
            "name the checkpoint of a run, or start a new one with `clipft train`",
        )


def _missing(content: dict[str, Any], kinds: dict[str, type]) -> list[str]:
    """Return the keys that ``content`` lacks or that have values of another type."""
    return [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]


def check_base_model(
    content: dict[str, Any], ours: Mapping[str, str], error: type[ClipftError]
) -> None:
    """Check that a checkpoint was trained from the pretrained model that is loaded now.

    ``ours`` is its name and fingerprint, as in ``content["base_model"]``.

    Raises:
        error: The fingerprints differ.
    """
    theirs = content["base_model"]
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise error(
            f"the checkpoint was trained from other weights: {theirs['name']} "
            f"({theirs['fingerprint'][:8]}) instead of {ours['name']} ({ours['fingerprint'][:8]})",
            "set --model to the base model it was trained from",
        )


def previous_of(checkpoint: Path) -> Path:
    """Return where the checkpoint before the newest one is kept."""
    return checkpoint.with_suffix(".previous.pt")


def checkpoint_exists(checkpoint: Path) -> bool:
    """Return True if the checkpoint or the one before it exists."""
    return checkpoint.exists() or previous_of(checkpoint).exists()


def save_newest(checkpoint: Path, content: dict[str, Any]) -> None:
    """Save a checkpoint, and keep the last one as the one before it.

    Raises:
        StorageError: The disk is full or refuses to write. Both files are unchanged.
    """
    previous = previous_of(checkpoint)
    link = previous.with_name(f".{previous.name}.part")
    with replacing(checkpoint) as temporary:
        write_file(temporary, content)
        # The new file was read back and is intact. Only now may the last one become the previous
        with suppress(FileNotFoundError):
            link.unlink()  # it may be left over from a killed run
        try:
            # A second name for the same file: ``checkpoint`` itself stays until it is replaced
            os.link(checkpoint, link)
        except FileNotFoundError:  # this is the first checkpoint of the run
            return
        except OSError:  # without links, only the previous checkpoint exists for a moment
            link = checkpoint
        try:
            link.replace(previous)
        except OSError:
            if link != checkpoint:
                link.unlink()
            raise


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint.

    ``damage`` says what is wrong with a newer one, if the one before it had to be used.
    """

    content: dict[str, Any]
    path: Path
    damage: ModelError | None = None


def load_newest(
    checkpoint: Path, load: Callable[[Path], dict[str, Any]] = load_checkpoint
) -> NewestCheckpoint:
    """Load a checkpoint, or the one before it if it is damaged or missing.

    ``load`` is ``load_checkpoint``, or ``check_checkpoint`` to do without the weights.

    Raises:
        ModelError: Neither of the two is intact, or the newest was refused for its content.
    """
    previous = previous_of(checkpoint)
    if not checkpoint.exists() and previous.exists():
        gone = ModelError(f"no checkpoint {checkpoint}", "")
        return NewestCheckpoint(load(previous), previous, gone)
    try:
        return NewestCheckpoint(load(checkpoint), checkpoint)
    except DamagedCheckpoint as damage:
        if not previous.exists():
            raise
        return NewestCheckpoint(load(previous), previous, damage)


def restore_previous(checkpoint: Path) -> Path | None:
    """Replace a damaged checkpoint by the one before it.

    The damaged file is renamed; returns its new path, or None if it did not exist.
    """
    aside = checkpoint.with_suffix(".damaged.pt")
    if checkpoint.exists():
        checkpoint.replace(aside)
    previous_of(checkpoint).replace(checkpoint)
    return aside if aside.exists() else None


def check_unchanged(whole: NewestCheckpoint, settings: Settings) -> None:
    """Check that ``settings`` continue the run of a checkpoint.

    Raises:
        ModelError: It holds only weights.
        UsageError: A setting that affects the weights was changed.
    """
    if not whole.content:  # only torch can read it
        return
    check_resumable(whole.path, whole.content)
    # A setting that the checkpoint does not know yet had the effect of its default
    saved = {**Settings().model_dump(mode="json"), **whole.content["settings"]}
    now = settings.model_dump(mode="json")
    changed = [name for name in fixed_on_resume() if saved[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} {saved[name]} -> {now[name]}" for name in changed)
        raise UsageError(
            f"these settings decide the weights and cannot change on resume: {listed}",
            "set them back, or start a new run with another --output-dir",
        )
