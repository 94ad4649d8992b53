"""Chooses the device and the precision of a run, and describes the machine."""

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
from clipft.config.sections.training import OptimSettings
from clipft.core.common import Note
from clipft.core.errors import UsageError

_PREFERRED = {"cuda": ("bf16", "fp16"), "cpu": ("bf16", "fp32"), "mps": ("fp32",)}
"""The precisions that ``auto`` tries on each kind of device, in this order."""

NARROW = 256
"""If a model's encoders are narrower than this, casting its activations to bf16 on a CPU takes
longer than the faster products save. Measured with AMX, one thread, and widths of 128, 256 and
384."""

_RECORDED_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Precision:
    """The precision of forward passes under ``autocast``. Trained weights stay in fp32."""

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
        """Return a loss scaler, which is disabled unless the precision is fp16, whose gradients
        would underflow without it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_device(settings: OptimSettings) -> torch.device:
    """Choose the device of a run from its settings and the hardware.

    Raises:
        UsageError: the requested device is not available here, or lacks the requested precision.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind: str = settings.device
    if kind == "auto":
        kind = next(name for name, present in available.items() if present)
    if not available[kind]:
        raise UsageError(
            f"--device {kind}: PyTorch {torch.__version__} finds no such device here",
            "run `clipft doctor` to see why, then fix the driver or the PyTorch build, or use "
            "--device auto",
        )
    if settings.precision == "fp16" and kind == "cpu":
        raise UsageError("--precision fp16 needs a GPU", "use --precision auto or fp32")
    return torch.device(kind)


def choose_precision(
    settings: OptimSettings, width: int, began: str = "", note: Note = lambda text: None
) -> Precision:
    """Choose the device and the precision for a model whose wider encoder has ``width`` dimensions.

    With ``auto``, a run that ``began`` in a precision ("" for a new run) keeps it if the device
    supports it, because another precision gives different weights. Otherwise the run continues in
    the precision that ``auto`` chooses for the device. This is possible because the trained weights
    and the optimizer's states are always fp32.

    Raises:
        UsageError: the requested device or precision is not available here.
    """
    device = choose_device(settings)
    kind, name = device.type, settings.precision
    if name != "auto":
        return Precision(name, device)
    preferred = ("fp32",) if kind == "cpu" and width < NARROW else _PREFERRED[kind]
    chosen = next(name for name in preferred if computes_in(kind, name))
    if began in {"", chosen}:
        return Precision(chosen, device)
    if computes_in(kind, began):
        note(
            f"note: this run began with {began} and continues with it; a new run would use "
            f"{chosen} on this {kind}."
        )
        return Precision(began, device)
    note(
        f"warning: this run began with {began}, which this {kind} does not support. "
        f"It continues with {chosen}, so its figures will differ from those of a run with a "
        "single precision."
    )
    return Precision(chosen, device)


def computes_in(kind: str, name: str) -> bool:
    """Return True if this machine's device of a kind has instructions for a precision.

    A precision without instructions is emulated and far slower, if it works at all.
    """
    if name == "bf16" and kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if name == "bf16" and kind == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return name == "fp32" or (name == "fp16" and kind != "cpu")


def compute_fp32_exactly() -> None:
    """Compute matrix products and convolutions of fp32 in fp32, on every device.

    By default, torch rounds the inputs of convolutions to TF32's 10 bits of mantissa on Ampere and
    newer GPUs. For speed, a run can use bf16 instead.
    """
    backends: Any = torch.backends  # its module has no type for the setting
    backends.fp32_precision = "ieee"
    # torch refuses to read the older forms of the setting while they contradict the new one
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def cast_frozen_weights(model: nn.Module, precision: Precision) -> None:
    """Store frozen weights in the dtype to which autocast would cast them at every use.

    The results are the same, but the weights take half the memory and need no casts.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for weight in layer.parameters(recurse=False):
                if not weight.requires_grad:
                    weight.data = weight.data.to(precision.dtype)


def instruction_set(device: torch.device) -> str:
    """Name the hardware on which the same computation gives the same bits.

    This is the generation of a GPU, or the vector instructions of a CPU with the number of threads,
    because sums are divided between the threads.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda sm_{major}{minor}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    return device.type


def environment(device: torch.device) -> dict[str, str]:
    """Return the software and hardware of a run by name. Nothing in it identifies the user, the
    host or its network."""
    found = {"clipft": __version__, "Python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
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
    try:  # platform.processor() is empty on most Linux systems
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    found["device"] = f"{device.type}, {processor}"
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    return found
