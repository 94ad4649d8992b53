"""Checks the installed libraries and the device that they find."""

import importlib
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

from clipft.config.settings import Settings
from clipft.core.errors import first_line
from clipft.doctor import Finding

_GIB = 1 << 30
_LOADED = ("numpy", "PIL", "torch", "torchvision", "transformers", "peft", "safetensors")
_SHOWN = ("torch", "torchvision", "transformers", "peft", "pillow")
_REINSTALL = (
    "install both from one index, as in `pip install --force-reinstall torch torchvision`; "
    "a torch for the CPU does not fit a torchvision for CUDA"
)


def packages(settings: Settings) -> Finding:
    """Compare the versions of the installed packages with those that clipft requires."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in requires("clipft") or ()]
    except PackageNotFoundError:  # clipft runs from a folder without being installed
        required = []
    wrong = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("error", "; ".join(wrong), "reinstall clipft: `pip install -U clipft`")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in _SHOWN))


def fit(settings: Settings) -> Finding:
    """Import the libraries, and check that torch and torchvision were built for each other."""
    for name in _LOADED:
        try:
            importlib.import_module(name)
            if name == "torchvision":
                importlib.import_module("torchvision.ops").nms  # noqa: B018 (loads its operators)
        except Exception as error:  # libraries may fail with anything
            hint = _REINSTALL if name in {"torch", "torchvision"} else f"reinstall {name}"
            reason = f"{type(error).__name__}: {first_line(error)}"
            return Finding("error", f"{name} does not load: {reason}", hint)
    import torch
    import torchvision

    ours, theirs = torch.version.cuda, getattr(torchvision.version, "cuda", None)
    torch_build, torchvision_build = (
        f"CUDA {cuda}" if cuda else "the CPU" for cuda in (ours, theirs)
    )
    if cuda_major(ours) != cuda_major(theirs):
        found = f"torch was built for {torch_build}, torchvision for {torchvision_build}"
        return Finding("error", found, _REINSTALL)
    return Finding("ok", f"they load together and are built for {torch_build}")


def cuda_major(cuda: str | int | None) -> int | None:
    """Return 13 for ``"13.2"``, the format of torch, and for 13020, the format of torchvision.

    None means a build for the CPU.
    """
    if cuda is None:
        return None
    text = str(cuda)
    return int(text) // 1000 if text.isdigit() else int(text.partition(".")[0])


def device(settings: Settings) -> Finding:
    """Find the device of a run, and the reason if it is not the GPU that the machine has."""
    import torch

    from clipft.models.device import choose_device

    # If torch finds no GPU, ask the driver
    card = "" if torch.cuda.is_available() else _nvidia_card()
    unusable = (
        f"PyTorch {torch.__version__} cannot use the GPU: it was built for the CPU, or for a "
        "newer CUDA than the driver supports; see https://pytorch.org/get-started"
    )
    if settings.device == "cuda" and card:
        return Finding("error", f"not cuda, although this machine has {card}", unusable)
    chosen = choose_device(settings)
    if chosen.type == "cpu" and settings.device == "auto":
        if card:
            return Finding("warning", f"cpu, although this machine has {card}", unusable)
        hint = "real models take hours on a CPU; try `--model tiny` first"
        return Finding("warning", "cpu: this machine has no GPU", hint)
    if chosen.type != "cuda":
        return Finding("ok", chosen.type)
    count = torch.cuda.device_count()
    driver = _nvidia_card().partition(", driver ")[2] or "unknown"
    cards = []
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        cards.append(f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
    found = f"{'; '.join(cards)}; driver {driver}, CUDA {torch.version.cuda}"
    if settings.processes > count:
        hint = f"each of the --processes needs a GPU of its own: use at most {count}"
        return Finding("error", found, hint)
    free, total = torch.cuda.mem_get_info()
    if free < total / 2:
        return Finding("warning", found, "another program uses most of it: see `nvidia-smi`")
    return Finding("ok", found)


def _nvidia_card() -> str:
    """Return the name and driver of the first card, as nvidia-smi reports them, or ""."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    name, _, driver = done.stdout.strip().partition("\n")[0].rpartition(", ")
    return f"{name}, driver {driver}"


def precision(settings: Settings) -> Finding:
    """Find the precision of a run."""
    from clipft.models.device import NARROW, choose_precision, computes_in

    chosen = choose_precision(settings, NARROW)
    kind = chosen.device.type
    if settings.precision == "bf16" and kind == "cpu" and not computes_in(kind, "bf16"):
        return Finding(
            "warning",
            "bf16, which this processor only emulates",
            "use --precision auto: with emulation a step takes minutes",
        )
    if settings.precision != "auto":
        return Finding("ok", f"{chosen.name} on {kind}, as set")
    narrow = choose_precision(settings, NARROW - 1).name
    less = "" if narrow == chosen.name else f"; {narrow} for encoders under {NARROW} dimensions"
    return Finding("ok", f"{chosen.name} on {kind}, chosen for this hardware{less}")


def eight_bit(settings: Settings) -> Finding:
    """Take one step with the 8-bit optimizer of bitsandbytes."""
    from clipft.models.device import choose_device
    from clipft.training.step.optimizer import eight_bit_fault

    where = choose_device(settings)
    if fault := eight_bit_fault(where):
        return Finding(
            "error" if settings.optimizer == "adamw8bit" else "warning",
            f"AdamW8bit does not run on {where.type}: {fault}",
            "use --optimizer adamw, or reinstall bitsandbytes",
        )
    return Finding("ok", f"bitsandbytes {version('bitsandbytes')} runs on {where.type}")
