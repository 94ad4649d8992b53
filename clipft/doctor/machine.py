"""Checks of the machine: memory, disks, limits."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from clipft.config.settings import Settings
from clipft.core.common import cache_folder, processors
from clipft.core.files import nearest_folder
from clipft.doctor.finding import Finding

_GIB = 1 << 30
_LITTLE_MEMORY = 4 * _GIB
"""ViT-B/32 in fp32, its libraries and a small batch take about 3 GiB."""
_LITTLE_ROOM = 5 * _GIB
"""Three files of scenario full on ViT-B/32: weights and two moments, 1.8 GiB each."""
_NO_ROOM = 256 << 20
_FEW_DESCRIPTORS = 1024
_NO_DESCRIPTORS = 128


def python(settings: Settings) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, {sys.executable}"
    if sys.maxsize < 1 << 32:
        return Finding("error", f"{found}, 32 bit", "PyTorch needs a 64-bit Python")
    return Finding("ok", found)


def memory(settings: Settings) -> Finding:
    import psutil
    import torch

    from clipft.core.memory import usable_memory

    machine = psutil.virtual_memory()
    usable = usable_memory(torch.device("cpu"))
    found = (
        f"{machine.total / _GIB:.1f} GiB, {machine.available / _GIB:.1f} free, "
        f"{usable / _GIB:.1f} usable within all limits; {processors()} processors"
    )
    if usable < _LITTLE_MEMORY:
        return Finding(
            "warning",
            found,
            f"less than {_LITTLE_MEMORY // _GIB} GiB is little for CLIP: close other programs, "
            "raise the container's limit, or use --num-workers 0 and a small --micro-batch-size",
        )
    return Finding("ok", found)


def shared_memory(settings: Settings) -> Finding:
    """Decoded pictures travel from workers through /dev/shm, which containers make small."""
    if settings.num_workers == 0:
        return Finding("ok", "not needed without workers")
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 (only looked at)
    except OSError:
        return Finding("ok", "this system has no /dev/shm")
    from clipft.data.loader import AHEAD_BYTES

    if free < AHEAD_BYTES:
        return Finding(
            "warning",
            f"{free / _GIB:.2f} GiB free in /dev/shm",
            "workers may die of it: start the container with --shm-size=2g or --ipc=host, or use "
            "--num-workers 0",
        )
    return Finding("ok", f"{free / _GIB:.1f} GiB free in /dev/shm")


def descriptors(settings: Settings) -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("ok", "this system sets no limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "no limit")
    limit = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} files may be open (at most: {limit})"
    if soft < _FEW_DESCRIPTORS:
        return Finding(
            "error" if soft < _NO_DESCRIPTORS else "warning",
            found,
            f"workers and shards need more: `ulimit -n {4 * _FEW_DESCRIPTORS}` before clipft",
        )
    return Finding("ok", found)


def output_folder(settings: Settings) -> Finding:
    return _folder(settings.run_dir, "--output-dir")


def cache(settings: Settings) -> Finding:
    found = _folder(cache_folder(), "CLIPFT_CACHE")
    if found.status == "error":  # each run then computes anew what could have been kept
        return Finding("warning", found.found, found.hint)
    return found


def _folder(folder: Path, name: str) -> Finding:
    """Is there room, and may a file be made? Tried in the part of the path that exists."""
    there = nearest_folder(folder)
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, f"{there} is a file")
        with tempfile.TemporaryFile(dir=there, prefix=".clipft-doctor-") as file:
            file.write(b"0")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(
            "error", f"{folder} cannot be written: {reason}", f"name another folder with {name}"
        )
    found = f"{folder} can be written, {free / _GIB:.1f} GiB free"
    if not os.path.isdir(folder):
        found += " (it will be made)"
    if free < _LITTLE_ROOM:
        return Finding(
            "error" if free < _NO_ROOM else "warning",
            found,
            f"make room or name another folder with {name}; `clipft train --plan` says how much "
            "a run takes",
        )
    return Finding("ok", found)
