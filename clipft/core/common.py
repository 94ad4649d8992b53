"""Small helpers and callback types that every part of the package may use."""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

Note = Callable[[str], None]
"""Receives a sentence for the user, such as a warning."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress display with a title and yields a function that takes (done, total)."""


@contextmanager
def silent(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show no progress at all."""
    yield lambda done, total: None


def checked(progress: Progress, check: Callable[[], None]) -> Progress:
    """Call ``check`` after each batch of a progress display, so that it can stop the work by
    raising an error."""

    @contextmanager
    def opened(title: str) -> Iterator[Callable[[int, int], None]]:
        with progress(title) as report:

            def check_and_report(done: int, total: int) -> None:
                check()
                report(done, total)

            yield check_and_report

    return opened


def counted(count: int, thing: str) -> str:
    """Format a number of things: ``1 pair``, ``2,000 pairs``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a duration: ``75`` becomes ``1m15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def shell_command(*words: object) -> str:
    """Return ``clipft WORDS`` as a shell reads it: words with spaces and the like are quoted.

    Every command that a message suggests with a path in it is made here, so that it can be copied.
    A path that begins with a dash gets ``./`` before it, or it would be read as an option.
    """
    given = [str(word) for word in words]
    for at, word in enumerate(words):
        if isinstance(word, Path) and given[at].startswith("-"):
            given[at] = f"./{word}"
    return shlex.join(["clipft", *given])


def processors() -> int:
    """Return how many processors this process may use; a container or scheduler may limit them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinities
        return os.cpu_count() or 1


def expand_home(path: str | Path) -> Path:
    """Replace a ``~`` at the beginning by the user's home folder.

    A shell does so for most words, but not within ``--data-dir=~/x``, quotes, or files.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name, and there is no such user: a folder may be called so
        return Path(path)
