"""With what a run was made: versions and device."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clipft import __version__

_PACKAGES = ("torch", "torchvision", "transformers", "peft", "bitsandbytes", "numpy", "pillow")


def environment(device: torch.device) -> dict[str, str]:
    """Names and values as people read them; nothing of the user, the host or its network."""
    found = {"clipft": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        found["device"] = f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
        return found
    found["device"] = f"{device.type}, {_processor()}"
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
