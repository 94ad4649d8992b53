"""Checks the memory, the disks and the limits of the machine."""

import resource
import shutil
import sys
import tempfile
from pathlib import Path

from clipft.config.settings import Settings
from clipft.core.cache import cache_folder
from clipft.core.common import processors
from clipft.core.files import nearest_folder
from clipft.doctor import Finding

_GIB = 1 << 30
_LITTLE_MEMORY = 4 * _GIB
"""ViT-B/32 in fp32, its libraries and a small batch take about 3 GiB."""
_LITTLE_SPACE = 5 * _GIB
"""Three files of the scenario ``full`` on ViT-B/32: weights and two moments, 1.8 GiB each."""
_NO_SPACE = 256 << 20
_IMAGE_SIDE = 224
"""The image size of most CLIP models, because the model itself is not loaded for this check."""
_MOST_SHARED = 0.25
_FEW_DESCRIPTORS = 1024
_NO_DESCRIPTORS = 128


def python(settings: Settings) -> Finding:
    """Check that the Python interpreter has 64 bits, which PyTorch needs."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    if sys.maxsize < 1 << 32:
        return Finding("error", f"{found}, 32 bit", "install a 64-bit Python, as PyTorch needs")
    return Finding("ok", found)


def memory(settings: Settings) -> Finding:
    """Check the free memory within all limits."""
    import psutil
    import torch

    from clipft.core.memory import usable_memory

    machine = psutil.virtual_memory()
    usable = usable_memory(torch.device("cpu"))
    found = (
        f"{machine.total / _GIB:.1f} GiB, {machine.available / _GIB:.1f} GiB free, "
        f"{usable / _GIB:.1f} GiB usable within all limits; {processors()} processors"
    )
    if usable < _LITTLE_MEMORY:
        return Finding(
            "warning",
            found,
            f"CLIP needs about {_LITTLE_MEMORY // _GIB} GiB: close other programs, raise the "
            "container's limit, or use --num-workers 0 and a small --micro-batch-size",
        )
    return Finding("ok", found)


def shared_memory(settings: Settings) -> Finding:
    """Find how much memory workers share with the main process, and check /dev/shm for NCCL."""
    import torch

    from clipft.core.memory import usable_memory
    from clipft.data.loader import LoaderOptions, shared_bytes
    from clipft.data.order import EpochPlan

    effective = settings.effective_batch_size
    plan = EpochPlan(effective, effective, settings.micro_batch_size or effective, 0)
    cpu, workers = torch.device("cpu"), settings.workers(settings.processes)
    needed = shared_bytes(plan, _IMAGE_SIDE, LoaderOptions(workers)) * settings.processes
    found = "not needed without workers"
    if workers:
        found = f"{needed / 2**20:,.0f} MiB for decoded images, none of it in /dev/shm"
        if needed > usable_memory(cpu) * _MOST_SHARED:
            hint = "that is much of the usable memory: use fewer --num-workers"
            return Finding("warning", found, hint)
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 (it is only measured)
    except OSError:
        return Finding("ok", found)
    found += f" ({free / 2**20:,.0f} MiB free there)"
    if settings.processes > 1 and torch.cuda.is_available() and free < _GIB:
        return Finding(
            "warning",
            found,
            "NCCL, which connects the GPUs, may need /dev/shm: start the container with "
            "--shm-size=1g or --ipc=host",
        )
    return Finding("ok", found)


def descriptors(settings: Settings) -> Finding:
    """Check how many files this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "no limit")
    limit = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} files may be open (hard limit: {limit})"
    if soft < _FEW_DESCRIPTORS:
        return Finding(
            "error" if soft < _NO_DESCRIPTORS else "warning",
            found,
            f"workers and shards need more: run `ulimit -n {4 * _FEW_DESCRIPTORS}` before clipft",
        )
    return Finding("ok", found)


def output_folder(settings: Settings) -> Finding:
    """Check that the run folder can be written to, and has space for checkpoints."""
    return _folder(settings.run_dir, "--output-dir")


def cache(settings: Settings) -> Finding:
    """Check the cache folder. Without a cache, runs still work, but compute more than necessary."""
    found = _folder(cache_folder(), "CLIPFT_CACHE")
    return Finding("warning", found.found, found.hint) if found.status == "error" else found


def _folder(folder: Path, name: str) -> Finding:
    """Create a file in ``folder``, or in the folder where it would be made, and measure the free
    space there."""
    existing = nearest_folder(folder)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing, prefix=".clipft-doctor-") as file:
            file.write(b"0")
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        reason = error.strerror or str(error)
        hint = f"choose another folder with {name}"
        return Finding("error", f"{folder} cannot be written to: {reason}", hint)
    found = f"{folder} can be written to, {free / _GIB:.1f} GiB free"
    if not folder.is_dir():
        found += " (it will be created)"
    if free < _LITTLE_SPACE:
        return Finding(
            "error" if free < _NO_SPACE else "warning",
            found,
            f"make room or choose another folder with {name}; `clipft train --plan` says how much "
            "space a run needs",
        )
    return Finding("ok", found)
