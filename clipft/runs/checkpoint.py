"""One file that holds all a run needs to go on, and only what the run changes.

A checkpoint is a ``torch.save`` zip of plain values and tensors, read with
``weights_only=True``: nothing in it is executed; ``checkpoint_file`` says what its bytes are.
``docs/checkpoint.md`` says what each key holds.

No random state is kept: everything random is a function of the seed and the position.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.core.errors import ModelError
from clipft.core.files import replacing
from clipft.runs.checkpoint_format import Damaged, check_file, file_size, has_checksum, write_file

FORMAT_VERSION = 2
_CHECKSUM_FROM = 2
"""Files of this format and later end with their checksum."""

_REQUIRED: dict[str, type] = {
    "epoch": int,
    "model_state_dict": dict,
    "settings": dict,
    "base_model": dict,
    "format_version": int,
}
_OF_A_RUN: dict[str, type] = {
    "step": int,
    "step_in_epoch": int,
    "loss": float,
    "epoch_loss_sum": float,
    "optimizer_state_dict": dict,
    "scheduler_state_dict": dict,
    "scaler_state_dict": dict,
    "skipped_in_a_row": int,
    "early_stopping": dict,
    "before": dict,
    "skipped_pairs": int,
}
"""Besides the required ones, what a run that trains goes on from."""

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda content: content,  # the same keys, in a file without a checksum of its own
}
"""Format -> how its content becomes that of the next one."""


class DamagedCheckpoint(ModelError):
    """Not the bytes that were written: an earlier file may be whole."""


def save_checkpoint(
    path: Path, content: dict[str, Any], before_replacing: Callable[[], None] = lambda: None
) -> None:
    """Write ``content`` so that ``path`` is at every moment the old file or the new one.
    ``before_replacing`` is called when the new one was read back and is whole.

    Raises:
        StorageError: the disk is full or refuses; the old file is untouched.
    """
    with replacing(path) as temporary:
        write_file(temporary, {**content, "format_version": FORMAT_VERSION})
        before_replacing()


def checkpoint_size(content: dict[str, Any]) -> int:
    """Bytes that ``save_checkpoint`` would write; nothing is written."""
    return file_size({**content, "format_version": FORMAT_VERSION})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint, onto the CPU, as the newest format has it.

    Raises:
        DamagedCheckpoint: truncated or altered.
        ModelError: missing, of another program or a newer clipft, or holding anything but
            plain values and tensors.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}", "check the path, or start with `clipft train`")
    try:
        check_file(path)
        checksum = has_checksum(path)
    except (OSError, Damaged) as error:
        raise DamagedCheckpoint(*_unreadable(path, f"is damaged: {error}")) from error
    content = _content(path)
    version = content["format_version"]
    if version > FORMAT_VERSION:
        raise ModelError(*_unreadable(path, "was written by a newer clipft"))
    if version >= _CHECKSUM_FROM and not checksum:
        raise DamagedCheckpoint(*_unreadable(path, "is damaged: its checksum is missing"))
    while version < FORMAT_VERSION:
        content, version = _MIGRATIONS[version](content), version + 1
    return content


def check_resumable(path: Path, content: dict[str, Any]) -> None:
    """
    Raises:
        ModelError: it holds weights, but not the state of a run.
    """
    of_a_run: dict[str, type] = _OF_A_RUN if content.get("step") else {"before": dict}
    if missing := _other_than(content, of_a_run):
        raise ModelError(
            f"{path} holds weights but no run to go on with: {missing}",
            "name the checkpoint of a run, or start one with `clipft train`",
        )


def _content(path: Path) -> dict[str, Any]:
    """
    Raises:
        ModelError: what torch refuses, or of another program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a reader of foreign bytes may raise anything
        why = "holds code or other things than weights and plain values; nothing of it was run"
        raise ModelError(*_unreadable(path, why)) from error
    if not isinstance(content, dict) or _other_than(content, _REQUIRED):
        raise ModelError(*_unreadable(path, "is not a checkpoint of clipft"))
    weights = content["model_state_dict"]
    named = all(isinstance(n, str) and isinstance(w, Tensor) for n, w in weights.items())
    known = all(isinstance(content["base_model"].get(k), str) for k in ("name", "fingerprint"))
    if not named or not known or content["format_version"] < 1:
        raise ModelError(*_unreadable(path, "is not a checkpoint of clipft"))
    return content


def _other_than(content: dict[str, Any], kinds: dict[str, type]) -> str:
    """Which keys are missing or of another kind; empty: none."""
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    return f"no {', '.join(wrong)}" if wrong else ""


def _unreadable(path: Path, why: str) -> tuple[str, str]:
    """Message and hint."""
    previous = previous_of(path)
    if previous.is_file():
        way = f"`clipft resume` goes on from the one before, {previous}, once {path.name} is gone"
        return f"{path} {why}", way
    return f"{path} {why}", "use another checkpoint, or train again"


def previous_of(checkpoint: Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    return checkpoint.with_suffix(".previous.pt")


@dataclass(frozen=True)
class Whole:
    """The newest checkpoint that is whole, and what is the matter with a newer one, if one is."""

    content: dict[str, Any]
    path: Path
    damage: ModelError | None = None


def save_newest(checkpoint: Path, content: dict[str, Any]) -> None:
    """
    Raises:
        StorageError: the disk is full or refuses; both files are as they were.
    """
    save_checkpoint(checkpoint, content, lambda: _keep(checkpoint))


def there_is_one(checkpoint: Path) -> bool:
    return checkpoint.exists() or previous_of(checkpoint).exists()


def newest_whole(checkpoint: Path) -> Whole:
    """The checkpoint, or the one before it where it is damaged or gone.

    Raises:
        ModelError: neither is whole, or the newest is refused for what it holds.
    """
    previous = previous_of(checkpoint)
    if not checkpoint.exists() and previous.exists():
        gone = ModelError(f"no checkpoint {checkpoint}", "")
        return Whole(load_checkpoint(previous), previous, gone)
    try:
        return Whole(load_checkpoint(checkpoint), checkpoint)
    except DamagedCheckpoint as damage:
        if not previous.exists():
            raise
        return Whole(load_checkpoint(previous), previous, damage)


def put_back(checkpoint: Path) -> Path | None:
    """The one before takes the place of a damaged one, which is kept: its new path, if it was
    there."""
    aside = checkpoint.with_suffix(".damaged.pt")
    if checkpoint.exists():
        checkpoint.replace(aside)
    previous_of(checkpoint).replace(checkpoint)
    return aside if aside.exists() else None


def _keep(checkpoint: Path) -> None:
    """The last checkpoint becomes the one before."""
    previous = previous_of(checkpoint)
    link = previous.with_name(f".{previous.name}.part")
    with suppress(FileNotFoundError):
        link.unlink()
    try:
        os.link(checkpoint, link)
    except FileNotFoundError:  # the first of a run
        return
    except OSError:  # a file system without links: for a moment there is the one before alone
        link = checkpoint
    try:
        link.replace(previous)
    except OSError:
        if link != checkpoint:
            link.unlink()
        raise
