"""Who is told of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipft.runs.records import Observer
from clipft.embedding.feature_cache import Progress, silent
from clipft.training.plan import Note


@dataclass(frozen=True)
class Watchers:
    """Observers of the run, notes for people, each saved checkpoint."""

    observer: Observer
    note: Note
    saved: Callable[[Path, int], None]
    """With the number of optimizer steps done."""
    progress: Progress = silent
