"""What a run left in its folder, as plain values; a run under way or stopped counts too."""

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clipft.core.errors import UsageError, first_line
from clipft.core.files import json_lines
from clipft.runs.records import RunRecords
from clipft.config.fields import fields_of
from clipft.config.settings import SECTIONS, Settings
from clipft.runs.folder import RunPaths

_LISTED = 50


def is_run(folder: Path) -> bool:
    paths = RunPaths.within(folder)
    return paths.settings.is_file() and paths.metrics.is_file()


def run_settings(folder: Path) -> Settings:
    """
    Raises:
        UsageError: no run is there, or its files are not clipft's.
    """
    if not is_run(folder):
        raise UsageError(f"no run in {folder}", "name the folder that holds its metrics.jsonl")
    path = RunPaths.within(folder).settings
    try:
        return Settings(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not as a run left it: {first_line(error)}",
            "put the file back as it was",
        ) from error


def read_run(folder: Path) -> RunRecords:
    """
    Raises:
        UsageError: no run is there, or its files are not clipft's.
    """
    settings, paths = run_settings(folder), RunPaths.within(folder)
    metrics, skipped = json_lines(paths.metrics), json_lines(paths.skipped)
    return RunRecords(
        folder=str(folder),
        settings=_settings_list(settings),
        run=_object(paths.record) or {},
        steps=[line for line in metrics if line.get("kind") == "step"],
        epochs=[line for line in metrics if line.get("kind") == "epoch"],
        result=_object(paths.result),
        evaluation=_object(paths.evaluation),
        interpolation=_object(paths.interpolation),
        kept=_object(paths.kept),
        skipped=skipped[:_LISTED],
        skipped_counts=dict(Counter(str(entry.get("split", "train")) for entry in skipped)),
    )


def _settings_list(settings: Settings) -> list[dict[str, Any]]:
    values = settings.model_dump(mode="json")
    standard = Settings().model_dump(mode="json")
    return [
        {
            "section": section.title,
            "name": name,
            "value": values[name],
            "default": standard[name],
            "changed": values[name] != standard[name],
        }
        for section in SECTIONS
        for name, _ in fields_of(section)
    ]


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}", "remove it") from error
    return found if isinstance(found, dict) else None
