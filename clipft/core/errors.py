"""Every error that a user can cause, as one tree.

ClipftError               1   base class, never raised itself
├── UsageError            2   wrong usage or settings
├── DataError             3   pairs that are missing, unreadable, or too often broken
├── StorageError          4   disks and buckets
├── ModelError            5   pretrained models, the hub, checkpoints
├── DivergedError         6   training diverged; the last good state is kept
├── ProcessError          7   another process of the run ended, hangs, or never started
├── RunsFailed            8   some runs of an ablation failed; the others are in its table
├── MemoryShortage        9   not even one pair fits into memory (the state is saved), or sharded
│                             weights make smaller chunks impossible
├── NotReady             10   ``clipft doctor`` found a problem, or a library does not load
└── Interrupted          75   a signal stopped the run; the state is saved for ``clipft resume``

Code anywhere in the package raises one of these with a message and a hint. Only ``cli.app.main``
catches them. Any other exception that reaches ``main`` is a bug and exits with 1.
"""

import difflib
from collections.abc import Callable, Iterable


class ClipftError(Exception):
    """Base class of all errors, with what the command line prints and its exit code.

    Attributes:
        message: What is wrong, and where.
        hint: What the user can do about it.
        exit_code: The exit code of the command line.
        said: True if another process of the same run already reports the error.
        alone: True if the other processes do not know of the error, so that no collective
            operation is possible any more.
    """

    exit_code = 1
    said = False
    alone = False

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["ClipftError"], tuple[str, str]]:
        # Errors are sent between processes, and the default would unpickle only ``message``
        return type(self), (self.message, self.hint)


class UsageError(ClipftError):
    exit_code = 2


class DataError(ClipftError):
    exit_code = 3


class StorageError(ClipftError):
    exit_code = 4


class ModelError(ClipftError):
    exit_code = 5


class DivergedError(ClipftError):
    exit_code = 6


class ProcessError(ClipftError):
    exit_code = 7
    alone = True


class RunsFailed(ClipftError):
    exit_code = 8


class MemoryShortage(ClipftError):
    exit_code = 9


class NotReady(ClipftError):
    exit_code = 10


class Interrupted(ClipftError):
    exit_code = 75


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, which may be followed by a long report.

    If the first line ends with a colon, the second line is added.
    """
    first, _, rest = str(error).strip().partition("\n")
    second = rest.strip().partition("\n")[0] if first.rstrip().endswith(":") else ""
    return f"{first.rstrip()} {second}".rstrip()


def did_you_mean(
    wrong: str, names: Iterable[str], spell: Callable[[str], str] = str, cutoff: float = 0.6
) -> str:
    """Return ``did you mean NAME?`` for the name closest to ``wrong``, or "" if none is close.

    Upper and lower case do not matter, and ``id`` and ``product`` are close to ``product.id``.
    ``spell`` turns the name into what the user would type. ``cutoff`` is the least similarity, from
    0 to 1.
    """
    by_key = {name.casefold(): name for name in names}
    key = wrong.casefold()
    close = difflib.get_close_matches(key, list(by_key), n=1, cutoff=cutoff)
    if not close and key:
        close = [k for k in by_key if k.endswith(f".{key}") or k.startswith(f"{key}.")]
    return f"did you mean {spell(by_key[close[0]])}?" if close else ""


def sentences(*parts: str) -> str:
    """Join the parts of a hint that are not empty."""
    return " ".join(part for part in parts if part)


def unknown_choice(value: str, choices: Iterable[str]) -> str:
    """Return ``must be one of A, B`` for a value that is not among ``choices``."""
    listed = list(choices)
    meant = did_you_mean(value, listed)
    return f"must be one of {', '.join(listed)}" + (f" ({meant})" if meant else "")
