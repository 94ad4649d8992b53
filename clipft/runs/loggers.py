"""Callbacks that keep the figures of a run: ``metrics.jsonl``, ``run.json``, and trackers."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from clipft.core.common import Note
from clipft.core.errors import first_line
from clipft.core.files import json_lines, read_json, write_json
from clipft.metrics.figures import DIRECTIONS, figure_tables
from clipft.runs.folder import RunPaths, append_lines
from clipft.runs.records import EpochResult, Plan, StepResult, TrainingCallback, Usage
from clipft.runs.trackers import Figures, Tracker

_CLOSING_SECONDS = 30.0
"""How long a finished run waits for a tracker to send the rest of its figures."""


class FileLogger(TrainingCallback):
    """Keeps ``metrics.jsonl`` and ``run.json`` in the run folder.

    ``metrics.jsonl`` gets a line for each step and each epoch. ``run.json`` has the plan, the
    versions of libraries, and what the run took. Its ``seconds`` (and what follows
    from them, see ``Usage``) count from the first batch of each process, so that a resumed run
    adds to its earlier parts; the time between the last epoch and a kill is lost. Its
    ``peak_memory_bytes`` is the highest of all parts.
    """

    def __init__(
        self,
        paths: RunPaths,
        environment: dict[str, str],
        peak_memory: Callable[[], int],
        price_per_hour: float | None = None,
    ) -> None:
        self._paths, self._environment, self._peak_memory = paths, environment, peak_memory
        self._price_per_hour = price_per_hour
        self._plan: Plan | None = None
        self._earlier: dict[str, Any] = {}
        self._began = 0.0

    def started(self, plan: Plan, done_steps: int) -> None:
        self._paths.metrics.touch()  # with this file, the folder counts as a run
        self._began = time.monotonic()
        self._plan = plan
        self._earlier = (read_json(self._paths.record) or {}) if done_steps else {}
        self._write_record()

    def stepped(self, result: StepResult) -> None:
        append_lines(self._paths.metrics, [result.metrics()], ascii_only=True)

    def epoch_ended(self, result: EpochResult) -> None:
        append_lines(self._paths.metrics, [result.metrics()], ascii_only=True)
        self._write_record()

    def closed(self) -> None:
        if self._plan:  # None if the run failed before it started
            self._write_record()

    def _write_record(self) -> None:
        assert self._plan
        earlier_peak = self._earlier.get("peak_memory_bytes", 0)
        seconds = self._earlier.get("seconds", 0.0) + time.monotonic() - self._began
        record = {
            "plan": asdict(self._plan),
            "environment": self._environment,
            "seconds": seconds,
            **Usage(self._plan, seconds, self._price_per_hour).to_dict(),
            "peak_memory_bytes": max(earlier_peak, self._peak_memory()),
        }
        write_json(self._paths.record, record, indent=2)


class TrackerLogger(TrainingCallback):
    """Sends the figures to a tracker.

    The tracker runs in a separate thread behind a queue. Training does not wait for it, and does
    not stop if its server, its disk or its process fails.
    """

    def __init__(self, tracker: Tracker, note: Note) -> None:
        self._tracker, self._note = tracker, note
        # (step, figures); step None is the summary, which is last
        self._queue: queue.SimpleQueue[tuple[int | None, Figures]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=tracker.title, daemon=True)
        self._done_steps = 0

    def started(self, plan: Plan, done_steps: int) -> None:
        self._done_steps = done_steps
        self._thread.start()

    def stepped(self, result: StepResult) -> None:
        figures = {
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/epoch": result.epoch,
            "train/grad_norm": result.grad_norm,
            "train/pairs_per_s": result.pairs / max(result.seconds, 1e-9),
        }
        self._queue.put((result.step, figures))

    def epoch_ended(self, result: EpochResult) -> None:
        figures = {"val/loss": result.val_loss, "val/epoch": result.epoch}
        for direction in DIRECTIONS:
            for name, value in result.retrieval[direction].items():
                figures[f"val/{direction}/{name}"] = value
        self._queue.put((result.step, figures))

    def closed(self) -> None:
        """Send the figures of the report as the summary, and wait for that, but not forever."""
        # From the files: another process may have measured the pretrained model
        paths = self._tracker.paths
        metrics, evaluation = json_lines(paths.metrics), read_json(paths.evaluation)
        summary = {
            f"{kind}/{row['key']}{'' if end == 'value' else f'/{end}'}": number
            for table in figure_tables(metrics, evaluation)
            for row in table["rows"]
            for kind in ("before", "after", "change")
            for end, number in (row[kind] or {}).items()
        }
        self._queue.put((None, summary))
        if not self._thread.is_alive():
            return
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            self._note(
                f"warning: {self._tracker.title} has not finished after {_CLOSING_SECONDS:.0f} s."
            )
            self._tracker.abandon()

    def _serve(self) -> None:
        """Send what is in the queue, up to the summary; runs in the thread."""
        try:
            self._tracker.open(self._done_steps)
            while True:
                step, figures = self._queue.get()
                if step is None:
                    return self._tracker.finish(figures)
                self._tracker.log(step, figures)
        except Exception as error:  # never a reason to stop training
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._note(f"warning: {self._tracker.title} is off for this run: {reason}")
