"""Measures how much memory this process may use, and how much a computation used."""

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
"""The share of the machine's free memory that may be used. The rest is for other programs, and for
later in the run."""
_LIMIT_SHARE = 0.97
"""The share of the memory left below a limit that may be used, if only this job has the limit."""
_STEP_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""The share of free memory that a step may use. The rest is for fragmentation and for later in the
run. The share is smaller on a CPU, because the heap keeps much of the freed memory, and the system
kills a process that uses too much instead of refusing memory."""
_PEAK_OVER_GRAPH = 2.0
"""Peak memory of a backward pass, as a multiple of the memory of its graph. Measured: 1.6 on
ViT-B/32, 1.8 on ``tiny``."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Larger limits mean that there is none: cgroup v1 has about 2^63 where v2 has ``max``."""


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak bytes during the block: reserved on a GPU, resident on a CPU.

    The value is absolute. The difference from the start would be too low, because an allocator
    keeps and reuses memory that an earlier block freed.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # If this fails, the peak is that of the whole process, and so never too low
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    peak = Peak()
    yield peak
    peak.bytes = peak_memory_so_far(device)


def peak_memory_so_far(device: torch.device) -> int:
    """Return the peak bytes: reserved on a GPU; resident in this process, not its workers, on a
    CPU."""
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
    """Return how many bytes this process may use, including those it already uses.

    On a CPU, the limits of the machine, the cgroup and the process all apply, and ``sharers``
    processes share the first two.
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

    ``root`` is the folder where cgroups are mounted, and ``membership`` is the file with the group
    of this process. Both versions of cgroups are supported.
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
        else:  # version 2 lists no controllers
            top, limit_name, used_name, reclaimable = root, "max", "current", "inactive_file"
        own = top / path.lstrip("/")
        # In a container, its own group is mounted at the top, whatever the path is
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
                # Files in the kernel's page cache count as used, but are dropped if memory is short
                free.append(max(0, int(limit) - used + int(stat.get(reclaimable, 0))))
    return free


@dataclass(frozen=True)
class MemoryBudget:
    """The memory for a step. The search for a micro-batch, the plan and the step itself use it.

    ``free`` is the number of bytes beside the weights, their gradients and the optimizer's states.
    A backward pass takes ``over_graph`` times the bytes of its graph.
    """

    free: float
    over_graph: float = _PEAK_OVER_GRAPH

    @classmethod
    def of(cls, free: float, device_type: str) -> "MemoryBudget":
        """Return the budget for ``free`` bytes on a type of device."""
        share = _STEP_SHARE.get(device_type, 0.0)  # the memory of mps cannot be measured
        return cls(max(0.0, free * share))

    @classmethod
    def now(cls, device: torch.device, to_come: int = 0, sharers: int = 1) -> "MemoryBudget":
        """Return the current budget, without ``to_come`` bytes that are needed for something else.

        On a CPU, ``sharers`` processes share the memory.
        """
        if device.type == "mps":
            return cls(0.0)
        # ``memory_in_use`` returns the peak on a GPU, but the memory in use now is needed here
        cuda = device.type == "cuda"
        used = int(torch.cuda.memory_allocated(device)) if cuda else memory_in_use(device)
        return cls.of(usable_memory(device, sharers) - used - to_come, device.type)

    def graphs(self, chunk: float) -> float:
        """Return the bytes that kept graphs may use beside the backward pass of a chunk whose graph
        has ``chunk`` bytes."""
        return max(0.0, self.free - (self.over_graph - 1) * chunk)

    def largest_micro_batch(self, per_pair: float) -> int:
        """Return the largest micro-batch if the graph of a pair has ``per_pair`` bytes."""
        return int(self.free / (self.over_graph * per_pair))

    def kept(self, micro: int, effective: int, per_pair: float) -> float:
        """Return the share of an effective batch whose graphs a step can keep, in whole
        micro-batches of ``micro`` pairs."""
        if micro >= effective or not per_pair:
            return 1.0
        kept = max(1, int(self.graphs(per_pair * micro) / (per_pair * micro)))
        return min(1.0, kept * micro / effective)

    def halved(self) -> "MemoryBudget":
        """Return half of the budget, for use after memory has run out."""
        return MemoryBudget(self.free / 2, self.over_graph)


def give_back(device: torch.device) -> None:
    """Return free memory to the system, which allocators would otherwise keep."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # only glibc has it
