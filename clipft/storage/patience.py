"""Asking again: with growing, random pauses, for as long as the user is patient."""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from clipft.core.errors import StorageError
from clipft.config.settings import StorageSettings
from clipft.storage.s3.errors import PASSING, Corrupt, explained, kind_of

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0
"""Seconds between tries, doubled each time; a random half of it is left out, so that many
machines do not come back at once."""

UNKNOWN_SERVER = 20.0
"""Seconds at most for a server that never answered: probably a wrong name."""

CORRUPT_TRIES = 4
"""A body that is wrong this often is wrong at its source."""

_SAID_AFTER = 5.0


class Stopped(Exception):
    """The work was given up meanwhile."""


class Patience:
    """Shared by the threads of one piece of work.

    ``say`` is told once, when failures last; ``stopping`` ends every pause.
    """

    def __init__(self, settings: StorageSettings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self.stopping = threading.Event()
        self._reached = self._said = self._failing = False

    def anew(self) -> "Patience":
        return Patience(self._settings, self._say)

    def ask(self, request: Callable[[], T], url: str) -> T:
        """What ``request`` returns, asked again while its failure may pass.

        Raises:
            StorageError: it failed for good, or for ``s3_patience`` seconds.
            OSError: the disk's, as it is.
            Stopped: ``stopping`` was set.
        """
        first, tries = 0.0, 0
        while not self.stopping.is_set():
            try:
                answer = request()
            except Exception as error:
                now, tries = time.monotonic(), tries + 1
                first = first or now
                if not self._worth_a_try(error, now - first, tries):
                    raise self._explained(error, url) from error
                self._tell(error, now - first, url)
                self._failing = True
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1))
                self.stopping.wait(pause * random.uniform(0.5, 1))  # noqa: S311
            else:
                self._reached, self._failing = True, False
                return answer
        raise Stopped

    def stop_if_failing(self) -> None:
        """End what is asked again and again at this moment; what goes well goes on."""
        if self._failing:
            self.stopping.set()

    def _worth_a_try(self, error: Exception, seconds: float, tries: int) -> bool:
        kind = kind_of(error)
        if kind not in PASSING or (isinstance(error, Corrupt) and tries >= CORRUPT_TRIES):
            return False
        if kind == "busy":
            self._reached = True
        patience = self._settings.s3_patience
        return seconds < (patience if self._reached else min(patience, UNKNOWN_SERVER))

    def _explained(self, error: Exception, url: str) -> Exception:
        if isinstance(error, (StorageError, Stopped)) or kind_of(error) == "disk":
            return error
        return explained(error, self._settings, url)

    def _tell(self, error: Exception, seconds: float, url: str) -> None:
        if seconds > _SAID_AFTER and not self._said:
            self._said = True
            why = explained(error, self._settings, url).message
            self._say(f"{why}. Still trying, for up to {self._settings.s3_patience:.0f} s")
