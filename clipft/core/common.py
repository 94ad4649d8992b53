"""What the machine gives this process."""

import os


def processors() -> int:
    """Processors that this process may use: containers and schedulers give it a share."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
