"""Memory: how much may be used, and how much a piece of work took."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

USABLE_SHARE = 0.8
"""Of what the machine has free: others use it too, and a run comes to need more."""
_LIMIT_SHARE = 0.97
"""Of what a limit leaves that is this job's alone."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""cgroup v1 writes about 2^63 where v2 writes max."""


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


def usable_memory(device: torch.device, sharers: int = 1) -> int:
    """Bytes that this process may hold, what it holds already included, within all limits.
    On a CPU so many ``sharers`` will want the same."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    shared = [psutil.virtual_memory().available * USABLE_SHARE]
    shared += [free * _LIMIT_SHARE for free in cgroup_free(_CGROUPS, _MEMBERSHIP)]
    own = [free * _LIMIT_SHARE for free in _rlimit_free()]
    return int(psutil.Process().memory_info().rss + min([min(shared) / sharers, *own]))


def give_back(device: torch.device) -> None:
    """Return what is free to the system: allocators keep it for later otherwise."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


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


def cgroup_free(root: Path, membership: Path) -> list[int]:
    """Bytes left under each memory limit of this process's cgroup and those above it, of
    version 1 or 2. Files that the kernel merely remembers do not count as used."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version2 = not controllers
        if not version2 and "memory" not in controllers.split(","):
            continue
        top = root if version2 else root / "memory"
        own = top / path.lstrip("/")
        # Within a container its own group is mounted as the top, whatever the path says
        for folder in {own, *own.parents, top}:
            if folder == top or top in folder.parents:
                free += _left_in(folder, version2)
    return free


def _left_in(folder: Path, version2: bool) -> list[int]:
    limit_name, used_name, reclaimable = (
        ("memory.max", "memory.current", "inactive_file")
        if version2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max" or int(limit) > _NO_LIMIT:
        return []
    return [max(0, int(limit) - used + int(stat.get(reclaimable, 0)))]


def _rlimit_free() -> list[int]:
    if sys.platform == "win32":
        return []
    import resource

    memory = psutil.Process().memory_info()
    limits = ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data))
    found = [(resource.getrlimit(limit)[0], used) for limit, used in limits]
    return [max(0, soft - used) for soft, used in found if soft != resource.RLIM_INFINITY]


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
