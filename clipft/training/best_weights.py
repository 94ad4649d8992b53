"""``best.pt``: the weights of the best epoch, which no checkpoint of a later epoch has."""

from enum import Enum
from pathlib import Path
from typing import Any

from clipft.core.errors import ModelError
from clipft.runs.checkpoint import load_checkpoint


class Best(Enum):
    """What ``best.pt`` is to a run that goes on."""

    THERE = "the weights of the best epoch"
    LATER = "those of an epoch that the run, killed after it, makes again"
    GONE = "not there, or of another epoch"


def load_best(path: Path, epoch: int) -> dict[str, Any]:
    """
    Raises:
        ModelError: it is damaged; with whose weights are lost and what can be done.
    """
    try:
        return load_checkpoint(path)
    except ModelError as error:
        raise ModelError(
            f"{error.message}: the weights of epoch {epoch}, the best one so far, are lost",
            f"put a copy of {path.name} back; or remove it, and `clipft resume` takes the best of "
            "the epochs from the checkpoint's on",
        ) from error


def find_best(path: Path, epoch: int, step: int, mendable: bool) -> Best:
    """``epoch`` is the best one as the checkpoint of ``step`` knows it. ``mendable``: a damaged
    file counts as gone.

    Raises:
        ModelError: as ``load_best``.
    """
    if not path.exists():
        return Best.GONE
    try:
        content = load_best(path, epoch)
    except ModelError:
        if mendable:
            return Best.GONE
        raise
    if content["epoch"] == epoch:
        return Best.THERE
    return Best.LATER if content.get("step", 0) > step else Best.GONE
