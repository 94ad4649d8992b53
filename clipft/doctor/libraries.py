"""Checks of the libraries and of what they find to compute on."""

import importlib
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from clipft.config.settings import Settings
from clipft.core.errors import UsageError, first_line
from clipft.doctor.finding import Finding

_GIB = 1 << 30
_LOADED = ("numpy", "PIL", "torch", "torchvision", "transformers", "peft", "safetensors")
_REINSTALL = (
    "install both from one index, as in `pip install --force-reinstall torch torchvision`; "
    "a CPU-only torch does not fit a CUDA torchvision"
)


def packages(settings: Settings) -> Finding:
    """Are the versions those that clipft asks for?"""
    wrong = list(_not_as_required())
    if wrong:
        return Finding("error", "; ".join(wrong), "install clipft anew: `pip install -U clipft`")
    shown = ("torch", "torchvision", "transformers", "peft", "pillow")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in shown))


def _not_as_required() -> Iterator[str]:
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("clipft") or ()]
    except PackageNotFoundError:  # run from a folder that was not installed
        return
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            yield f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            yield f"{requirement.name} {there} is not {requirement.specifier}"


def fit(settings: Settings) -> Finding:
    """Do the libraries load together?"""
    for name in _LOADED:
        try:
            importlib.import_module(name)
            if name == "torchvision":
                importlib.import_module("torchvision.ops").nms  # noqa: B018 (loads its operators)
        except Exception as error:  # they share no base class
            hint = _REINSTALL if name in {"torch", "torchvision"} else f"reinstall {name}"
            return Finding(
                "error", f"{name} does not load: {type(error).__name__}: {first_line(error)}", hint
            )
    import torch
    import torchvision

    ours, theirs = torch.version.cuda, getattr(torchvision.version, "cuda", None)
    if _major(ours) != _major(theirs):
        return Finding(
            "error",
            f"torch is built for {_build(ours)}, torchvision for {_build(theirs)}",
            _REINSTALL,
        )
    return Finding("ok", f"they load together, built for {_build(ours)}")


def _build(cuda: str | int | None) -> str:
    return "the CPU" if cuda is None else f"CUDA {cuda}"


def _major(cuda: str | int | None) -> int | None:
    """``13.2`` as torch writes it, 13020 as torchvision does."""
    if cuda is None:
        return None
    text = str(cuda)
    return int(text) // 1000 if text.isdigit() else int(text.partition(".")[0])


def device(settings: Settings) -> Finding:
    """Where a run would compute."""
    import torch

    from clipft.models.device import choose_precision

    card = "" if torch.cuda.is_available() else _driver()
    unusable = (
        f"PyTorch {torch.__version__} cannot use it: is it built for the CPU, or for a "
        "newer CUDA than the driver's? See https://pytorch.org/get-started"
    )
    if settings.device == "cuda" and card:
        return Finding("error", f"not cuda, though this machine has {card}", unusable)
    chosen = choose_precision(settings).device
    if chosen.type == "cuda":
        return _gpus(settings.processes)
    if chosen.type == "cpu" and settings.device == "auto":
        if card:
            return Finding("warning", f"cpu, though this machine has {card}", unusable)
        return Finding(
            "warning", "cpu: no GPU", "real models take hours on a CPU; --model tiny does not"
        )
    return Finding("ok", chosen.type)


def _gpus(processes: int) -> Finding:
    import torch

    count = torch.cuda.device_count()
    driver = _driver().partition(", driver ")[2] or "unknown"
    cards = []
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        cards.append(f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
    found = f"{'; '.join(cards)}; driver {driver}, CUDA {torch.version.cuda}"
    if processes > count:
        return Finding(
            "error", found, f"--processes {processes} needs as many GPUs: use {count} at most"
        )
    free, total = torch.cuda.mem_get_info()
    if free < total / 2:
        return Finding("warning", found, "another program holds most of it: see `nvidia-smi`")
    return Finding("ok", found)


def _driver() -> str:
    """Name and driver of the first card, as NVIDIA's own tool says it; "" where it is not."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    name, _, driver = said.stdout.strip().partition("\n")[0].rpartition(", ")
    return f"{name}, driver {driver}"


def precision(settings: Settings) -> Finding:
    """In which numbers a run would compute."""
    from clipft.models.device import choose_precision

    chosen = choose_precision(settings)
    how = "chosen for this hardware" if settings.precision == "auto" else "as set"
    if chosen.name == "bf16" and chosen.device.type == "cpu" and settings.precision == "bf16":
        auto = choose_precision(settings.model_copy(update={"precision": "auto"}))
        if auto.name != "bf16":
            return Finding(
                "warning",
                "bf16, which this processor only emulates",
                "use --precision auto: emulated, a step takes minutes",
            )
    return Finding("ok", f"{chosen.name} on {chosen.device.type}, {how}")


def eight_bit(settings: Settings) -> Finding:
    """bitsandbytes: does a step of its optimizer run?"""
    import torch

    from clipft.models.device import choose_precision
    from clipft.training.step.optimizer import make_optimizer

    where = choose_precision(settings).device
    weight = torch.nn.Parameter(torch.zeros(64, 64, device=where))
    weight.grad = torch.ones_like(weight)
    needed = settings.optimizer == "adamw8bit"
    try:
        make_optimizer("adamw8bit", [{"params": [weight], "lr": 1e-3}], where).step()
    except (UsageError, RuntimeError, OSError) as error:
        return Finding(
            "error" if needed else "warning",
            f"AdamW8bit does not run on {where.type}: {first_line(error)}",
            "use --optimizer adamw, or mend the installation of bitsandbytes",
        )
    return Finding("ok", f"bitsandbytes {version('bitsandbytes')} runs on {where.type}")
