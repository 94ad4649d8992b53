"""Finds the other processes of a run in the environment of torchrun or SLURM.

torchrun (and ``clipft train --processes``) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. ``srun`` sets variables of other names. There the processes meet on the job's first
node, at a port derived from the job id. SLURM_STEP_NUM_TASKS is the number of processes.
SLURM_NTASKS is not used, because it is also set in a batch script, which runs alone.
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
from clipft.core.common import Note
from clipft.core.errors import ClipftError, Interrupted, ProcessError, UsageError
from clipft.distributed.collectives import ALONE, DistributedProcesses, Processes
from clipft.distributed.waiting import meet
from clipft.models.device import choose_device

_FIRST_PORT, _PORT_COUNT = 20_000, 20_000
"""Range of the ports at which SLURM jobs meet."""
_PATIENT_TIMEOUT = timedelta(days=30)

_NCCL_ERRORS = {
    # Whole weights: each of the few collectives of a step makes the CPU wait until it is done, and
    # raises in this thread if another process is lost. NCCL is then aborted, so the GPU can be
    # used again and the state be saved; and no step goes on with half a sum.
    False: ("TORCH_NCCL_BLOCKING_WAIT", "1"),
    # Sharded weights: FSDP must be able to fetch the next layer while this one computes. Torch's
    # watchdog (CleanUpOnly) aborts NCCL after the timeout, and the next collective raises. What is
    # computed until then is wrong, but it is never saved: a state takes collectives of all. The
    # default of torch would end this process without a word.
    True: ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"),
}
"""How a lost process is noticed while NCCL waits for it, by whether the weights are sharded. Gloo,
which carries the headers of each step, notices a closed socket at once."""


@dataclass(frozen=True)
class Rendezvous:
    """The ranks of this process, and the address at which all processes meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int


def find_rendezvous(environ: Mapping[str, str]) -> Rendezvous | None:
    """Read the rendezvous from the environment; None if this process runs alone.

    Raises:
        UsageError: the environment announces several processes but is incomplete.
    """
    try:
        if environ.get("RANK") and environ.get("WORLD_SIZE"):
            world_size = int(environ["WORLD_SIZE"])
            return Rendezvous(
                rank=int(environ["RANK"]),
                world_size=world_size,
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
                address=environ["MASTER_ADDR"],
                port=int(environ["MASTER_PORT"]),
            )
        if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
            world_size = int(environ["SLURM_STEP_NUM_TASKS"])
            nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
            node_list = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
            # The first node of a list such as "gpu[03-07,12],login" is gpu03
            match = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", node_list)
            if not match:
                raise ValueError(f"no node in {node_list!r}")
            job_port = _FIRST_PORT + int(environ["SLURM_JOB_ID"]) % _PORT_COUNT
            return Rendezvous(
                rank=int(environ["SLURM_PROCID"]),
                world_size=world_size,
                local_rank=int(environ["SLURM_LOCALID"]),
                local_world_size=-(-world_size // nodes),
                address=environ.get("MASTER_ADDR") or match[1] + (match[2] or ""),
                port=int(environ.get("MASTER_PORT", job_port)),
            )
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the environment announces several processes but is incomplete: {error}",
            "start them with torchrun, srun, or `clipft train --processes N`",
        ) from error
    return None


@contextmanager
def start_processes(settings: Settings, note: Note = lambda text: None) -> Iterator[Processes]:
    """Meet the other processes of this run, and leave them at the end of the block.

    While processes are missing, ``note`` receives a line every few seconds. On GPUs, this process
    takes the one of its local rank. An error that all processes raise is marked as ``said`` on all
    but rank zero, so that the user reads it once.

    Raises:
        UsageError: the environment is incomplete, or there are fewer GPUs than processes.
        ProcessError: other processes did not arrive within the timeout.
    """
    place = find_rendezvous(os.environ)
    if place is None or place.world_size == 1:
        yield ALONE
        return
    processes = _meet(place, settings, note)
    try:
        yield processes
    except ClipftError as error:
        error.said = place.rank > 0 and not error.alone
        if isinstance(error, Interrupted):
            processes.leave()
        raise
    # Not after any other error: NCCL would wait for a process that is gone
    processes.leave()


def _meet(place: Rendezvous, settings: Settings, note: Note) -> DistributedProcesses:
    backend = _take_device(place, settings)
    minutes = settings.process_timeout
    try:
        store, roll = meet(place.address, place.port, place.rank, place.world_size, minutes, note)
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(minutes=minutes),
        )
        patient_group = dist.new_group(backend="gloo", timeout=_PATIENT_TIMEOUT)
        if backend != "gloo":
            _connect_devices(place.world_size)
    except RuntimeError as error:
        raise ProcessError(
            f"process {place.rank} of {place.world_size} cannot join the others at "
            f"{place.address}:{place.port} ({' '.join(str(error).split())[:120]})",
            "check that all of them were started, that the address can be reached, and that no "
            "other program uses the port",
        ) from error
    return DistributedProcesses(
        *(place.rank, place.world_size, place.local_rank, place.local_world_size),
        *(patient_group, roll, note),
    )


def _take_device(place: Rendezvous, settings: Settings) -> str:
    """Make the GPU of this process the current one, and return torch's name of the backends.

    Raises:
        UsageError: this machine has fewer GPUs than processes, or none that can communicate.
    """
    device = choose_device(settings).type
    if device == "mps":
        raise UsageError("--device mps works with one process only", "drop --processes")
    if device == "cpu":
        return "gloo"
    gpus = torch.cuda.device_count()
    # SLURM may show each process its own GPU only
    bound = gpus == 1 and place.local_world_size > 1
    if gpus < place.local_world_size and not (bound and "SLURM_PROCID" in os.environ):
        raise UsageError(
            f"{place.local_world_size} processes on this machine, but {gpus} GPUs",
            f"start {gpus} processes, or use --device cpu",
        )
    torch.cuda.set_device(0 if bound else place.local_rank)
    os.environ.setdefault(*_NCCL_ERRORS[settings.shard_weights])
    return "cpu:gloo,cuda:nccl"


def _connect_devices(world_size: int) -> None:
    """Let NCCL connect the GPUs while there is memory for its buffers.

    Otherwise NCCL would connect them in the first step, when the model and its activations fill the
    memory, and could run out of memory while other processes already wait.
    """
    own = torch.ones(1, device="cuda")
    dist.all_reduce(own)
    dist.all_gather_into_tensor(own.new_empty(world_size), own)
