"""A run's newest checkpoint and the one before it, which stays until a newer one is known whole.

At every moment one of the two files can be gone on from: the new file is read back before the
last one takes the place of the one before, and takes its own place after that.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.core.errors import ModelError
from clipft.runs.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    previous_of,
    save_checkpoint,
)


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
