"""SIGTERM and SIGINT ask a run to stop after its step, or between two batches of a measurement;
a second SIGINT stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from clipft.core.errors import Interrupted


@dataclass
class StopRequest:
    """Set by the first signal; ``name`` says which it was."""

    name: str | None = None

    def check(self, when: str, checkpoint: Path | None) -> None:
        """To be called where the run may stop. ``checkpoint`` is where its state is, once the
        error has left the run; None: there is none yet.

        Raises:
            Interrupted: a signal asked to stop.
        """
        if self.name is None:
            return
        said = f"stopped by {self.name} {when}"
        if checkpoint is None:
            raise Interrupted(f"{said}; nothing was trained yet", "start it again as before")
        raise Interrupted(
            f"{said}; the state is saved in {checkpoint}",
            f"go on with `clipft resume {checkpoint}`",
        )


_HEARD = b"\nStopping, with the state saved ... (Ctrl-C again: at once)\n"
_AT_ONCE = (
    b"\nStopped at once: `clipft resume` goes on from the last checkpoint, if there is one.\n"
)


@contextmanager
def stop_on_signals(speaks: bool = True) -> Iterator[StopRequest]:
    """Catch the signals within the block (main thread only; elsewhere nothing is caught).
    ``speaks``: answer a Ctrl-C, since a step may take long."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.name is not None and number == signal.SIGINT
        if speaks and number == signal.SIGINT:
            with suppress(OSError):  # not print, within which the signal may have come
                os.write(2, _AT_ONCE if again else _HEARD)
        if again:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
