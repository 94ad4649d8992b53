"""Where the figures of a run are kept: metrics.jsonl always, Weights & Biases if asked.

W&B lives in a thread of its own behind a queue: training neither waits for it nor stops
for it, whatever its server, its disk or its process does.
"""

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from clipft.config.settings import TrackingSettings
from clipft.core.errors import first_line
from clipft.core.files import disk_error, json_lines, write_text
from clipft.metrics.figures import DIRECTIONS, figure_tables
from clipft.runs.records import EpochResult, Plan, StepResult

METRICS = "metrics.jsonl"
_CLOSING_SECONDS = 30.0


class JsonlTracker:
    """One JSON object per line: ``kind`` is ``step`` or ``epoch``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def started(self, plan: Plan, done_steps: int) -> None:
        self._file = self._path.open("a", encoding="utf-8")

    def stepped(self, result: StepResult) -> None:
        self._write(result.metrics())

    def epoch_ended(self, result: EpochResult) -> None:
        self._write(result.metrics())

    def closed(self) -> None:
        if self._file:
            with suppress(OSError):  # what a full disk did not take was told when it was written
                self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        """
        Raises:
            StorageError: the disk is full or refuses.
        """
        assert self._file
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(self._path, error) from error


@dataclass(frozen=True)
class _Logged:
    """``step`` None: for the summary."""

    step: int | None
    figures: dict[str, Any]


def _end_service() -> None:
    """wandb's own process, for which the program would wait for minutes at its exit."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()


def _summary(folder: Path) -> dict[str, Any]:
    """``before/``, ``after/`` and ``change/`` of each figure of the report, and the ends of its
    interval; also of a resumed run, whose first process measured the untouched model."""
    evaluation = folder / "evaluation.json"
    judged = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.exists() else None
    return {
        f"{kind}/{row['key']}{'' if end == 'value' else f'/{end}'}": number
        for table in figure_tables(json_lines(folder / METRICS), judged)
        for row in table["rows"]
        for kind in ("before", "after", "change")
        for end, number in (row[kind] or {}).items()
    }


class WandbTracker:
    """The same figures in W&B, under the run's own id, so that a resumed run goes on there."""

    def __init__(
        self,
        settings: TrackingSettings,
        folder: Path,
        config: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._folder, self._config, self._warn = settings, folder, config, warn
        self._queue: queue.SimpleQueue[_Logged | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)

    def started(self, plan: Plan, done_steps: int) -> None:
        self._thread.start()

    def stepped(self, result: StepResult) -> None:
        figures = {"loss": result.loss, "lr": result.lr, "epoch": result.epoch}
        figures["grad_norm"] = result.grad_norm
        figures["pairs_per_s"] = result.pairs / max(result.seconds, 1e-9)
        named = {f"train/{k}": v for k, v in figures.items()}
        self._queue.put(_Logged(result.step, named))

    def epoch_ended(self, result: EpochResult) -> None:
        figures: dict[str, Any] = {"val/loss": result.val_loss, "val/epoch": result.epoch}
        for direction in DIRECTIONS:
            for name, value in result.retrieval[direction].items():
                figures[f"val/{direction}/{name}"] = value
        self._queue.put(_Logged(result.step, figures))

    def closed(self) -> None:
        """The last that W&B is told are the figures of the report, as the run's summary."""
        self._queue.put(_Logged(None, _summary(self._folder)))
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(_CLOSING_SECONDS)
            if self._thread.is_alive():
                self._warn(f"warning: W&B has not finished after {_CLOSING_SECONDS:.0f} s.")
                _end_service()

    def _serve(self) -> None:
        try:
            run = self._init()
            while (item := self._queue.get()) is not None:
                if item.step is None:
                    run.summary.update(item.figures)
                else:
                    run.log(item.figures, step=item.step)
            run.finish()
        except Exception as error:  # never a reason to stop training
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._warn(f"warning: W&B is off for this run: {reason}")

    def _init(self) -> Any:
        import wandb

        return wandb.init(
            project=self._settings.wandb_project,
            mode=self._settings.wandb,
            id=self._run_id(),
            resume="allow",
            dir=str(self._folder),
            config=self._config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def _run_id(self) -> str:
        path = self._folder / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


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
