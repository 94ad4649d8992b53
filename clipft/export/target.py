"""Checks the formats and the target folder of an export before it begins, without torch."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from clipft.config.sections.model import OWN_SIZES
from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.core.files import check_writable, read_json

Format = Literal[
    "transformers", "peft", "onnx", "openvino", "coreml", "sentence-transformers", "open_clip"
]
FORMATS: tuple[str, ...] = get_args(Format)
MARK = "clipft.json"
"""The file that marks an exported folder, which may be replaced."""

RUNTIME_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "coreml": ("coremltools",),
}
"""The packages that are needed to write and check each format for another runtime. Only these
formats have a ``--precision``."""
_NONE: Mapping[str, str] = {}


def check_target(out: Path) -> None:
    """Check, before a long export, that ``out`` can be written and contains no files of the user.

    Raises:
        UsageError: ``out`` is not a folder, or is neither empty nor an earlier export.
        StorageError: ``out`` cannot be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is not a folder", "name a folder that does not exist yet")
    mark = read_json(out / MARK) or {}
    exported = "format" in mark  # the file of a base model has only learning rates
    if out.is_dir() and not exported and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty, and is not an earlier export: it has no {MARK}",
            "name a folder that does not exist yet",
        )
    check_writable(out.with_name(f".{out.name}.part"))


def chosen_formats(
    asked: str, unfit: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Choose the formats to write for ``--format asked``, which may be ``all``.

    Args:
        asked: one of ``FORMATS``, or ``all``.
        unfit: the formats in which the model cannot be exported, with the reasons.

    Returns:
        The formats, and the skipped formats with the reasons.

    Raises:
        UsageError: the format asked for does not fit the model, or a package for it is missing.
    """
    if asked in unfit:
        instead = next(name for name in FORMATS if name not in unfit)
        raise UsageError(
            f"--format {asked}: {unfit[asked]}", f"use --format {instead}, which holds all weights"
        )
    if asked != "all":
        check_installed(asked)
        return (asked,), {}
    missing = {
        name: f"it needs {' and '.join(lacking)}"
        for name in FORMATS
        if (lacking := missing_packages(name))
    }
    skipped = {**missing, **unfit}
    return tuple(name for name in FORMATS if name not in skipped), skipped


def unfit_for(settings: Settings, unfit: Mapping[str, str] = _NONE) -> dict[str, str]:
    """Return ``{"peft": reason}`` if a model with these settings cannot be exported as an adapter,
    else an empty dict.

    ``unfit`` are the formats in which models of its architecture cannot be exported, with the
    reasons, if the architecture is known.
    """
    why = why_no_adapter(settings, unfit)
    return {"peft": why} if why else {}


def why_no_adapter(settings: Settings, unfit: Mapping[str, str] = _NONE) -> str:
    """Return the reason why a model cannot be written as an adapter; "" if it can."""
    if not settings.declared_scenario.lora:
        return f"{settings.scenario} trains no adapter"
    if settings.input_sizes != OWN_SIZES:
        return "an adapter would lack the positions of --context-length and --image-size"
    return unfit.get("peft", "")


def missing_packages(name: str) -> list[str]:
    """Return the packages for a format that are not installed."""
    return [p for p in RUNTIME_PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]


def check_installed(name: str) -> None:
    """Check that the packages for writing and checking a format are installed.

    Raises:
        UsageError: a package is missing.
    """
    if missing := missing_packages(name):
        raise UsageError(
            f"--format {name} needs {' and '.join(missing)}",
            f"install them: pip install 'clipft[{name}]', or pipx inject clipft "
            + " ".join(missing),
        )
