"""Memory: how much this process may use, and how much a piece of work took."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

USABLE_SHARE = 0.8
"""The share of the machine's free memory that may be used: other programs need some, and a run
needs more later."""
_LIMIT_SHARE = 0.97
"""The share of what is left below a limit that applies to this job alone."""
_STEP_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""The share of free memory that a step may fill. The rest is for fragmentation and for what a run
needs later. The share of a CPU is smaller, because its heap keeps much of what it frees, and the
system ends a process that takes too much instead of refusing memory."""
_PEAK_OVER_GRAPH = 2.0
"""Peak memory of a backward pass, as a multiple of the graph: 1.6 measured on ViT-B/32, 1.8 on
``tiny``."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""cgroup v1 writes about 2^63 where v2 writes ``max``."""


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak bytes during the block: reserved on a GPU, resident on a CPU.

    The value is absolute. An allocator keeps and reuses what an earlier block freed, so the
    difference from the start would be too low.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Where this fails, the peak covers the whole life of the process: never too low
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    peak = Peak()
    yield peak
    peak.bytes = peak_memory_so_far(device)


def peak_memory_so_far(device: torch.device) -> int:
    """Return peak bytes: reserved on a GPU, resident in this process (not its workers) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # unlike getrusage, this can be reset
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use(device: torch.device) -> int:
    """Return the peak bytes of a GPU so far, or the bytes now resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def usable_memory(device: torch.device, sharers: int = 1) -> int:
    """Return how many bytes this process may hold, including those it holds already.

    On a CPU, the limits of the machine, the cgroup and the process are all respected, and
    ``sharers`` processes share the first two.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    memory = psutil.Process().memory_info()
    shared = [psutil.virtual_memory().available * USABLE_SHARE]
    shared += [free * _LIMIT_SHARE for free in cgroup_free(_CGROUPS, _MEMBERSHIP)]
    own = []
    for limit, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            own.append(max(0, soft - used) * _LIMIT_SHARE)
    return int(memory.rss + min([min(shared) / sharers, *own]))


def cgroup_free(root: Path, membership: Path) -> list[int]:
    """Return the bytes left below each memory limit of this process's cgroup and its parents.

    ``root`` is where cgroups are mounted, ``membership`` names the group of this process. Both
    versions of cgroups are read.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            top, limit_name, used_name = root / "memory", "limit_in_bytes", "usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:  # version 2 names no controllers
            top, limit_name, used_name, reclaimable = root, "max", "current", "inactive_file"
        own = top / path.lstrip("/")
        # Within a container its own group is mounted at the top, whatever the path says
        for folder in {own, *own.parents, top}:
            if folder != top and top not in folder.parents:
                continue
            try:
                limit = (folder / f"memory.{limit_name}").read_text().strip()
                used = int((folder / f"memory.{used_name}").read_text())
                lines_of_stat = (folder / "memory.stat").read_text().splitlines()
                stat = dict(entry.split() for entry in lines_of_stat)
            except (OSError, ValueError):
                continue
            if limit != "max" and int(limit) <= _NO_LIMIT:
                # Files that the kernel merely caches count as used, but are dropped when memory
                # runs short
                free.append(max(0, int(limit) - used + int(stat.get(reclaimable, 0))))
    return free


@dataclass(frozen=True)
class MemoryBudget:
    """The memory of a step: the search for a micro-batch, the plan and the step all ask it.

    ``free`` bytes are left beside the weights, their gradients and the states of the optimizer.
    A backward pass takes ``over_graph`` times the bytes of the graph that it runs through.
    """

    free: float
    over_graph: float = _PEAK_OVER_GRAPH

    @classmethod
    def of(cls, free: float, device_type: str) -> "MemoryBudget":
        """The budget where so many bytes are free on a type of device."""
        share = _STEP_SHARE.get(device_type, 0.0)  # the memory of mps cannot be measured
        return cls(max(0.0, free * share))

    @classmethod
    def now(cls, device: torch.device, to_come: int = 0, sharers: int = 1) -> "MemoryBudget":
        """The budget at this moment, of which ``to_come`` bytes are needed for something else.

        On a CPU, ``sharers`` processes share the memory.
        """
        if device.type == "mps":
            return cls(0.0)
        # Not the peak, as ``memory_in_use`` has it on a GPU: what is free counts, not what was
        cuda = device.type == "cuda"
        used = int(torch.cuda.memory_allocated(device)) if cuda else memory_in_use(device)
        return cls.of(usable_memory(device, sharers) - used - to_come, device.type)

    def graphs(self, chunk: float) -> float:
        """Bytes that kept graphs may fill, beside the backward pass of one chunk whose graph has
        ``chunk`` bytes."""
        return max(0.0, self.free - (self.over_graph - 1) * chunk)

    def largest_micro_batch(self, per_pair: float) -> int:
        """The most pairs that can go through together, if the graph of one has so many bytes."""
        return int(self.free / (self.over_graph * per_pair))

    def kept(self, micro: int, effective: int, per_pair: float) -> float:
        """The share of the graphs of an effective batch that a step keeps, in whole micro-batches
        of ``micro``."""
        if micro >= effective or not per_pair:
            return 1.0
        kept = max(1, int(self.graphs(per_pair * micro) / (per_pair * micro)))
        return min(1.0, kept * micro / effective)

    def halved(self) -> "MemoryBudget":
        """Half of this, after memory has run out."""
        return MemoryBudget(self.free / 2, self.over_graph)


def give_back(device: torch.device) -> None:
    """Return free memory to the system; allocators would keep it for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # only glibc has it
