"""SIGTERM and SIGINT ask a run to stop after its step, or between two batches of a validation.

A second SIGINT stops it at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from clipft.core.common import shell_command
from clipft.core.errors import Interrupted

_HEARD = b"\nStopping; saving the state first ... (press Ctrl-C again to stop at once)\n"
_AT_ONCE = (
    b"\nStopped at once. `clipft resume` continues from the last checkpoint, if there is one.\n"
)


@dataclass
class StopRequest:
    """A request to stop. The first signal sets ``name`` to its name."""

    name: str | None = None

    def check(self, when: str, checkpoint: Path | None) -> None:
        """Stop here if a signal asked for it.

        ``when`` completes the message. ``checkpoint`` is the path to which the run will save its
        state because of the error, or None if there is no state to save.

        Raises:
            Interrupted: a signal asked to stop.
        """
        if self.name is None:
            return
        said = f"stopped by {self.name} {when}"
        if checkpoint is None:
            raise Interrupted(f"{said}; nothing was trained yet", "run the same command again")
        raise Interrupted(
            f"{said}; the state is saved in {checkpoint}",
            f"continue with `{shell_command('resume', checkpoint)}`",
        )


@contextmanager
def stop_on_signals(speaks: bool = True) -> Iterator[StopRequest]:
    """Catch the signals inside the block.

    Only the main thread can catch signals; in other threads this does nothing. ``speaks``:
    acknowledge a Ctrl-C on the terminal, because a step may take long.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.name is not None and number == signal.SIGINT
        if speaks and number == signal.SIGINT:
            # Not print, because the signal may have interrupted another print
            with suppress(OSError):
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


def end_with_parent() -> None:
    """Save the state and end this process if its parent dies: if killed, it sends no signal."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
