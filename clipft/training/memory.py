"""Memory: how much may be used, and how much a piece of work took."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

USABLE_SHARE = 0.8
"""Of the free memory of a CPU: the system and the data workers need the rest."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak bytes during the block: reserved on a GPU, resident of this process on a CPU.

    Absolute, not over what was there before: an allocator keeps and reuses what an earlier
    block freed, so a difference would say too little.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_reserved(device)
        return
    _reset_peak_rss()
    yield peak
    peak.bytes = _peak_rss()


def memory_in_use(device: torch.device) -> int:
    """Peak bytes of a GPU so far, or the resident bytes of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_memory_so_far(device: torch.device) -> int:
    """Peak bytes: reserved on a GPU, resident of this process (without its workers) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return _peak_rss()


def usable_memory(device: torch.device) -> int:
    """Bytes that this process may hold, what it holds already included, within all limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = [psutil.virtual_memory().available, *_cgroup_free(), *_rlimit_free()]
    return int(psutil.Process().memory_info().rss + min(free) * USABLE_SHARE)


GRAPH_SHARE = 0.6
"""Of what is usable and not in use when graphs of a step are first kept: backward passes,
fragments and what else a run comes to need have the rest."""


def free_for_graphs(device: torch.device, to_come: int) -> int:
    """Bytes that the graphs of a step may hold; ``to_come`` is known to be needed later."""
    if device.type == "mps":  # its memory cannot be measured
        return 0
    used = memory_in_use(device)
    if device.type == "cuda":
        used = int(torch.cuda.memory_allocated(device))
    return max(0, int((usable_memory(device) - used - to_come) * GRAPH_SHARE))


def _cgroup_free() -> list[int]:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [max(0, int(limit) - used)]


def _rlimit_free() -> list[int]:
    if sys.platform == "win32":
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    return [max(0, limit - psutil.Process().memory_info().vms)]


def _reset_peak_rss() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then covers the process's life: too high, never too low


def _peak_rss() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
