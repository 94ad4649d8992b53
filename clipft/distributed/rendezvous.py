"""Finding the other processes of a run: torchrun's environment, SLURM's, or nobody.

torchrun (and ``clipft train --processes``) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. ``srun`` sets its own names for the same; there the first node of the job is the
meeting place, and its port follows from the job's number. SLURM_STEP_NUM_TASKS, and not
SLURM_NTASKS, says how many there are: the latter is set in a batch script too, which runs alone.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from clipft.config.settings import Settings
from clipft.core.errors import ClipftError, Interrupted, ProcessError, UsageError
from clipft.distributed.collectives import ALONE, ManyProcesses, Processes
from clipft.models.device import choose_precision

_PORTS = (20_000, 20_000)
"""First and number of the ports that jobs of SLURM meet at."""
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Place:
    """This process among ``count``, and where they meet."""

    rank: int
    count: int
    local_rank: int
    local_world_size: int
    address: str
    port: int


def find_place(environ: Mapping[str, str]) -> Place | None:
    """None: a process of its own.

    Raises:
        UsageError: the environment says that there are others but not where.
    """
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return _from_torchrun(environ)
        if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
            return _from_slurm(environ)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the environment names other processes but is not complete: {error}",
            "start them with torchrun, srun, or `clipft train --processes N`",
        ) from error
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Place:
    count = int(environ["WORLD_SIZE"])
    return Place(
        rank=int(environ["RANK"]),
        count=count,
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", count)),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def _from_slurm(environ: Mapping[str, str]) -> Place:
    first, many = _PORTS
    rank, count = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    listed = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    port = first + int(environ["SLURM_JOB_ID"]) % many
    return Place(
        rank=rank,
        count=count,
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world_size=-(-count // nodes),
        address=environ.get("MASTER_ADDR") or _first_node(listed),
        port=int(environ.get("MASTER_PORT", port)),
    )


def _first_node(listed: str) -> str:
    """``gpu[03-07,12],login`` -> ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", listed)
    if not match:
        raise ValueError(f"no node in {listed!r}")
    return match[1] + (match[2] or "")


@contextmanager
def start_processes(settings: Settings) -> Iterator[Processes]:
    """Meet the other processes; on a GPU, take the one of this process's place. An error of
    all that leaves the block is said by the first process.

    Raises:
        UsageError: the environment is not complete, or there are too few GPUs.
        ProcessError: the others did not come within the timeout.
    """
    place = find_place(os.environ)
    if place is None or place.count == 1:
        yield ALONE
        return
    processes = _meet(place, settings)
    try:
        yield processes
    except ClipftError as error:
        error.said = place.rank > 0 and not error.alone
        if isinstance(error, Interrupted):
            processes.part()
        raise
    # Not after another error: NCCL would wait for a process that is gone
    processes.part()


def _meet(place: Place, settings: Settings) -> ManyProcesses:
    backend = _take_device(place, settings)
    wait = timedelta(minutes=settings.process_timeout)
    address = f"[{place.address}]" if ":" in place.address else place.address  # IPv6
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{place.port}",
            rank=place.rank,
            world_size=place.count,
            timeout=wait,
        )
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise ProcessError(
            f"process {place.rank} of {place.count} did not find the others at "
            f"{place.address}:{place.port} within {settings.process_timeout:g} minutes "
            f"({' '.join(str(error).split())[:120]})",
            "check that all of them were started, and that the address can be reached",
        ) from error
    return ManyProcesses(place.rank, place.count, place.local_rank, place.local_world_size, patient)


def _take_device(place: Place, settings: Settings) -> str:
    """Make the GPU of this place the current one; the backends for what is computed on.

    Raises:
        UsageError: there are fewer GPUs than processes on this machine, or no way to talk.
    """
    device = choose_precision(settings).device.type
    if device == "mps":
        raise UsageError("--device mps serves one process only", "leave --processes out")
    if device == "cpu":
        return "gloo"
    there = torch.cuda.device_count()
    bound = there == 1 and place.local_world_size > 1  # SLURM may show each process its own GPU
    if there < place.local_world_size and not (bound and "SLURM_PROCID" in os.environ):
        raise UsageError(
            f"{place.local_world_size} processes on this machine, but {there} GPUs",
            f"start {there}, or use --device cpu",
        )
    torch.cuda.set_device(0 if bound else place.local_rank)
    # A lost process is then an error of the call that waits for it, not the end of this one
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    return "cpu:gloo,cuda:nccl"
