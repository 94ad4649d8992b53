"""What the machine gives this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


def processors() -> int:
    """Processors that this process may use: containers and schedulers give it a share."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


Note = Callable[[str], None]


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a display under a heading; what it gives is told (done, all)."""


@contextmanager
def silent(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress that nobody looks at."""
    yield lambda done, rows: None


def checked(progress: Progress, check: Callable[[], None]) -> Progress:
    """The same, but ``check`` is called after each batch and may end the work by what it
    raises."""

    @contextmanager
    def opened(title: str) -> Iterator[Callable[[int, int], None]]:
        with progress(title) as tell:

            def told(done: int, rows: int) -> None:
                check()
                tell(done, rows)

            yield told

    return opened


def cache_folder() -> Path:
    """``CLIPFT_CACHE``, or ``clipft`` in the user's cache folder; not made here."""
    return Path(
        os.environ.get("CLIPFT_CACHE")
        or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clipft"
        )
    )


def counted(count: int, thing: str) -> str:
    """``1 pair``, ``2,000 pairs``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
