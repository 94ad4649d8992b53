"""Where to compute and in which numbers: chosen once, by what the hardware has."""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipft import __version__
from clipft.config.settings import OptimSettings
from clipft.core.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """Forward passes run under ``autocast``; weights and optimizer stay fp32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.float32)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def make_scaler(self) -> "torch.amp.GradScaler":
        """Scales the loss where fp16 gradients would underflow; else hands it through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(settings: OptimSettings) -> Precision:
    """The device and the numbers of a run.

    Raises:
        UsageError: the device or the precision asked for is not there.
    """
    device = _device(settings.device)
    name = _best(device) if settings.precision == "auto" else settings.precision
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU", "use --precision auto or fp32")
    return Precision(name, device)


def cast_frozen_weights(model: nn.Module, precision: Precision) -> None:
    """Keep the weights that autocast would cast at each use, and that do not learn, in the
    dtype it casts them to: the same numbers, half the memory, no casting."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for weight in layer.parameters(recurse=False):
                if not weight.requires_grad:
                    weight.data = weight.data.to(precision.dtype)


def _device(asked: str) -> torch.device:
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if asked == "auto":
        return torch.device(next(name for name, present in there.items() if present))
    if not there[asked]:
        raise UsageError(
            f"--device {asked}: PyTorch {torch.__version__} finds no such device here",
            "`clipft doctor` says why; mend the driver or the PyTorch build, or use --device auto",
        )
    return torch.device(asked)


def _best(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 is emulated, and slower by orders of magnitude
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


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
