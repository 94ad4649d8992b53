"""Repeat requests that fail for a temporary reason."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from clipft.config.sections.data import StorageSettings
from clipft.core.common import Note
from clipft.core.errors import StorageError
from clipft.storage.s3.errors import TEMPORARY, Corrupt, Stopped, explained, kind_of

Answer = TypeVar("Answer")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0
"""Seconds between attempts. The pause doubles each time, and is shortened at random by up to half,
so that many machines do not retry at the same moment."""

UNKNOWN_SERVER_TIMEOUT = 20.0
"""Seconds to retry a server that has never answered, because its name is probably wrong."""

CORRUPT_ATTEMPTS = 4
"""After this many corrupt bodies, the object itself is considered corrupt."""

_NOTE_AFTER = 5.0
"""Seconds of failures before the user is told that clipft is retrying."""


@dataclass
class Retry:
    """Retry requests until they succeed or the retry timeout is over: ``retry(request, url)``.

    All threads of a transfer share one object. Setting ``stopping`` ends every pause and stops all
    requests. ``failing`` says whether a request is currently being retried. ``note`` is called once
    if requests keep failing.
    """

    settings: StorageSettings
    note: Note
    stopping: threading.Event = field(default_factory=threading.Event)
    failing: bool = False
    _server_answered: bool = False
    _noted: bool = False

    def __call__(self, request: Callable[[], Answer], url: str) -> Answer:
        """Return the result of ``request``; call it again after temporary failures.

        Raises:
            StorageError: the failure is permanent, or it lasted for the retry timeout.
            OSError: the local disk failed.
            Stopped: ``stopping`` was set.
        """
        first_failure, failures = 0.0, 0
        while not self.stopping.is_set():
            try:
                answer = request()
            except Exception as error:
                kind, now, failures = kind_of(error), time.monotonic(), failures + 1
                if isinstance(error, (StorageError, Stopped)) or kind == "disk":
                    raise
                first_failure = first_failure or now
                self._server_answered |= kind == "busy"
                timeout = self.settings.s3_retry_timeout
                limit = timeout if self._server_answered else min(timeout, UNKNOWN_SERVER_TIMEOUT)
                hopeless = isinstance(error, Corrupt) and failures >= CORRUPT_ATTEMPTS
                if kind not in TEMPORARY or hopeless or now - first_failure >= limit:
                    self.failing = False
                    raise explained(error, self.settings, url) from error
                if now - first_failure > _NOTE_AFTER and not self._noted:
                    self._noted = True
                    why = explained(error, self.settings, url).message
                    self.note(f"{why}. Retrying for up to {timeout:.0f} s.")
                self.failing = True
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1))
                self.stopping.wait(pause * random.uniform(0.5, 1))  # noqa: S311
            else:
                self._server_answered, self.failing = True, False
                return answer
        raise Stopped
