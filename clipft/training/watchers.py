"""Who is told of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipft.records import Observer
from clipft.training.feature_cache import Progress, silent
from clipft.training.planning import Note


@dataclass(frozen=True)
class Watchers:
    """Observers of the run, notes for people, each saved checkpoint."""

    observer: Observer
    note: Note
    saved: Callable[[Path, int], None]
    """With the number of optimizer steps done."""
    progress: Progress = silent
