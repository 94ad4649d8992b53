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
    """Call ``check`` at each update of a progress display, so that it can stop the computation with
    an error."""

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
    """Return ``clipft WORDS`` for a shell, with quotes around words that need them.

    Every command with a path in a message is made here, so that it can be copied. A path that
    begins with a dash gets the prefix ``./``, or it would be read as an option.
    """
    given = [str(word) for word in words]
    for at, word in enumerate(words):
        if isinstance(word, Path) and given[at].startswith("-"):
            given[at] = f"./{word}"
    return shlex.join(["clipft", *given])


def processors() -> int:
    """Return how many processors this process may use. Containers and schedulers may limit them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS does not have it
        return os.cpu_count() or 1


def expand_home(path: str | Path) -> Path:
    """Replace a ``~`` at the beginning by the user's home folder.

    A shell does this for most words, but not within ``--data-dir=~/x``, quotes, or files.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, so ~name may be a folder
        return Path(path)
