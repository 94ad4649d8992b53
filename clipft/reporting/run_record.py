"""``run.json``: what a run planned, with what it was made, and what it cost."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipft.core.files import write_text
from clipft.runs.records import EpochResult, Plan, StepResult


class RunRecorder:
    """Watches a run. ``seconds`` is the time of its processes from their first batch on, that
    of a resumed run added to what was before; what a kill cut off since the last epoch's end
    is not in it. ``peak_memory_bytes`` is the highest of them."""

    def __init__(
        self, path: Path, environment: dict[str, str], peak_memory: Callable[[], int]
    ) -> None:
        self._path, self._environment, self._peak_memory = path, environment, peak_memory
        self._plan: dict[str, Any] | None = None
        self._earlier: dict[str, Any] = {}
        self._began = 0.0

    def started(self, plan: Plan, done_steps: int) -> None:
        self._began = time.monotonic()
        self._plan = asdict(plan)
        self._earlier = _read(self._path) if done_steps else {}
        self._write()

    def stepped(self, result: StepResult) -> None:
        return None

    def epoch_ended(self, result: EpochResult) -> None:
        self._write()

    def closed(self) -> None:
        if self._plan:
            self._write()

    def _write(self) -> None:
        record = {
            "plan": self._plan,
            "environment": self._environment,
            "seconds": self._earlier.get("seconds", 0.0) + time.monotonic() - self._began,
            "peak_memory_bytes": max(
                self._earlier.get("peak_memory_bytes", 0), self._peak_memory()
            ),
        }
        write_text(self._path, json.dumps(record, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record
