"""Every error that a user can cause, as one tree.

ClipftError               1   (never raised itself)
├── UsageError            2   wrong usage or settings
├── DataError             3   the pairs: missing, unreadable, too many bad ones
├── StorageError          4   disks and buckets
├── ModelError            5   base models, hubs, checkpoints
├── DivergedError         6   training diverged; the last good state is kept
├── ProcessError          7   another process of the run ended, hangs, or never came
├── RunsFailed            8   some runs of an ablation failed; the others are in its table
 ├── MemoryShortage        9   not even one pair fits into memory, the state is saved; or sharded
 │                             weights leave no way to smaller pieces
 ├── NotReady             10   ``clipft doctor`` found what stops a run; a library does not load
└── Interrupted          75   stopped by a signal, state saved; ``clipft resume`` goes on

A service raises one of these with the sentence and the mend; ``cli.app.main`` alone
catches them. Whatever else reaches ``main`` is a bug and exits with 1.
"""

import difflib
from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """What a library's error says, without what follows below."""
    return str(error).strip().partition("\n")[0]


class ClipftError(Exception):
    """What was wrong and where (``message``), what to do (``hint``), and the exit code.

    ``said``: another process of the run tells the user of it. ``alone``: the other processes
    do not know of it, and nothing can be done together any more.
    """

    exit_code = 1
    said = False
    alone = False

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["ClipftError"], tuple[str, str]]:
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


def nearest(wrong: str, right: Iterable[str]) -> str | None:
    """The name of ``right`` that was probably meant by ``wrong``, if any is close."""
    matches = difflib.get_close_matches(wrong.lower(), list(right), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_choice(value: str, choices: Iterable[str]) -> str:
    """The sentence for a value that is not among ``choices``."""
    listed = list(choices)
    near = nearest(value, listed)
    return f"must be one of {', '.join(listed)}" + (f" (did you mean {near}?)" if near else "")
