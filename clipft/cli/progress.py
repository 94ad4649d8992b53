"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from clipft.cli.console import say
from clipft.core.common import counted, duration
from clipft.metrics.figures import DIRECTIONS
from clipft.runs.records import EpochResult, Plan, StepResult, TrainingCallback

_PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""

_BAR_AND_TIME = 20
"""Columns that stay for the bar and the time left."""
_ROW_WIDTH = 80
"""Columns of a table of epochs, ``best so far`` included."""
_DIRECTIONS = tuple(label.replace("→", "->") for label in DIRECTIONS.values())

Memory = Callable[[], int]
"""Bytes in use."""


def make_progress(console: Console, memory: Memory) -> TrainingCallback:
    """The display that fits ``console``."""
    kind = LiveProgress if console.is_interactive else PlainProgress
    return kind(console, memory)


class _Lines(TrainingCallback):
    """The lines both displays share: the plan at the start, figures at each epoch's end."""

    _headed = False

    def __init__(self, console: Console, memory: Memory) -> None:
        self._console, self._memory = console, memory
        self._plan: Plan | None = None
        self._pace = Pace()

    def started(self, plan: Plan, done_steps: int) -> None:
        self._plan = plan
        for line in plan_lines(plan):
            self._say(line)

    def epoch_ended(self, result: EpochResult) -> None:
        epochs = self._plan.epochs if self._plan else 0
        if not self._console.is_interactive or self._console.width < _ROW_WIDTH:
            self._say(epoch_line(result, epochs))
            return
        if not self._headed:
            self._headed = True
            if result.val_floor:
                self._say(f"note: no model has a val loss below {result.val_floor:.4f} here.")
            head = Text("\n".join(epoch_head()), style="bold")
            self._console.print(head, soft_wrap=True)
        self._say(epoch_row(result, epochs))

    def _say(self, line: str) -> None:
        say(self._console, line)


class LiveProgress(_Lines):
    """A bar with the step's figures beside it."""

    def __init__(self, console: Console, memory: Memory) -> None:
        super().__init__(console, memory)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", justify="right"),
            # The one column that is not cut where the terminal is narrow
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", visible=False, figures="")

    def started(self, plan: Plan, done_steps: int) -> None:
        super().started(plan, done_steps)
        if plan.total_steps:
            self._progress.start()
            self._progress.reset(
                self._task,
                total=plan.total_steps,
                completed=done_steps,
                description=f"step {done_steps}/{plan.total_steps}",
                figures="",
                visible=True,
            )

    def stepped(self, result: StepResult) -> None:
        assert self._plan
        self._pace.add(result)
        total = self._plan.total_steps
        done = (
            f"epoch {result.epoch}/{self._plan.epochs} step {result.step:{len(str(total))}}/{total}"
        )
        figures = self._figures(result, self._console.width - len(done) - _BAR_AND_TIME)
        self._progress.update(self._task, advance=1, description=done, figures=figures)

    def _figures(self, result: StepResult, room: int) -> str:
        """As many as leave room for the bar; the last go first."""
        figures = step_figures(result, self._pace, self._memory())
        while len(figures) > 1 and len("  ".join(figures)) > room:
            figures.pop()
        return "  ".join(figures)

    def closed(self) -> None:
        self._progress.stop()


class PlainProgress(_Lines):
    """A line at the first step, then every ten seconds."""

    def __init__(self, console: Console, memory: Memory) -> None:
        super().__init__(console, memory)
        self._last = float("-inf")

    def stepped(self, result: StepResult) -> None:
        assert self._plan
        self._pace.add(result)
        now = time.monotonic()
        if now - self._last < _PLAIN_EVERY:
            return
        self._last = now
        left = self._pace.seconds_per_step * (self._plan.total_steps - result.step)
        figures = " ".join(step_figures(result, self._pace, self._memory()))
        self._say(
            f"epoch {result.epoch}/{self._plan.epochs} "
            f"step {result.step}/{self._plan.total_steps} "
            f"{' '.join(figures.split())} {duration(left)} left"
        )

    def closed(self) -> None:
        return None


class Pace:
    """Running means, so that the shown speed does not jump from step to step."""

    _WEIGHT = 0.1

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.pairs_per_s = 0.0
        self.data_share = 0.0
        """Of the time, spent waiting for data."""

    def add(self, result: StepResult) -> None:
        seconds = max(result.seconds, 1e-9)
        weight = self._WEIGHT if self.seconds_per_step else 1.0
        self.seconds_per_step += weight * (seconds - self.seconds_per_step)
        self.pairs_per_s += weight * (result.pairs / seconds - self.pairs_per_s)
        self.data_share += weight * (result.data_seconds / seconds - self.data_share)


def plan_lines(plan: Plan) -> list[str]:
    """The plan of a run as people read it."""
    lines = [
        f"{plan.scenario} on {plan.model}: {plan.parameters}.",
        f"{counted(plan.train_pairs, 'training pair')}, "
        f"{counted(plan.val_pairs, 'validation pair')}; {plan.device}, {plan.precision}.",
    ]
    if plan.total_steps:
        each = counted(plan.steps_per_epoch, "step")
        among = f" over {plan.processes} processes" if plan.processes > 1 else ""
        warmup = counted(plan.warmup_steps, "step")
        lines.append(
            f"{counted(plan.epochs, 'epoch')} x {each} of "
            f"{counted(plan.effective_batch_size, 'pair')} "
            f"(micro-batches of {plan.micro_batch_size}{among}), warm-up {warmup}, "
            f"{plan.optimizer}."
        )
    return lines + [f"note: {note}." for note in plan.notes]


def step_figures(result: StepResult, pace: Pace, memory: int) -> list[str]:
    """The most wanted first; of equal lengths from step to step."""
    skipped = [] if result.applied else ["gradient not finite: step skipped"]
    return [
        f"loss {result.loss:.4f}",
        *skipped,
        f"{pace.pairs_per_s:4.0f} pairs/s",
        f"wait {pace.data_share:4.0%}",
        f"{memory / 2**30:4.1f} GiB",
        f"lr {result.lr:.2e}",
    ]


def epoch_line(result: EpochResult, epochs: int) -> str:
    """All of an epoch in one line that needs no heading."""
    train = f" train loss {result.train_loss:.4f}" if result.train_loss is not None else ""
    recalls = "  ".join(
        f"{name} R@1 {figures['r@1']:.1%} R@10 {figures['r@10']:.1%}"
        for name, figures in zip(_DIRECTIONS, _directions(result), strict=True)
    )
    best = "  best so far" if result.improved else ""
    floor = f" (floor {result.val_floor:.4f})" if result.val_floor else ""
    label = _label(result, epochs)
    return f"{label}:{train} val loss {result.val_loss:.4f}{floor}  {recalls}{best}"


def epoch_head() -> list[str]:
    """The heading of ``epoch_row``, in two lines."""
    first, second = _DIRECTIONS
    recalls = f"  {'R@1':>7}{'R@10':>7}"
    return [
        f"{'':15}{'loss':>18}  {first:>14}  {second:>14}",
        f"{'':15}{'train':>9}{'val':>9}{recalls}{recalls}",
    ]


def epoch_row(result: EpochResult, epochs: int) -> str:
    """An epoch as a row of a table whose columns stay in their places."""
    train = f"{result.train_loss:.4f}" if result.train_loss is not None else ""
    recalls = "".join(f"  {f['r@1']:>7.1%}{f['r@10']:>7.1%}" for f in _directions(result))
    best = "  best so far" if result.improved else ""
    return f"{_label(result, epochs):15}{train:>9}{result.val_loss:>9.4f}{recalls}{best}"


def _label(result: EpochResult, epochs: int) -> str:
    return f"epoch {result.epoch}/{epochs}" if result.epoch else "untouched model"


def _directions(result: EpochResult) -> list[dict[str, Any]]:
    return [result.retrieval[direction] for direction in DIRECTIONS]


_PLAIN_EVERY_transfers = 5.0
"""Seconds between lines where there is no terminal."""


class Transferred(Protocol):
    """What is watched: done and all of both."""

    @property
    def files_done(self) -> int: ...
    @property
    def files(self) -> int: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes(self) -> int: ...


Report = Callable[[Transferred], None]


@contextmanager
def bar(console: Console) -> Iterator[Report]:
    """A bar that is gone at the end."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text, left = TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), left)
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("listing", total=None)

        def report(now: Transferred) -> None:
            files = f"{now.files_done:,}/{now.files:,} files"
            shown.update(task, description=files, completed=now.bytes_done, total=now.bytes)

        yield report


@contextmanager
def lines(note: Callable[[str], None]) -> Iterator[Report]:
    """A line every few seconds."""
    start = last = time.monotonic()

    def report(now: Transferred) -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last < _PLAIN_EVERY_transfers:
            return
        last = clock
        rate = max(now.bytes_done, 1) / (clock - start)
        note(
            f"{now.files_done:,}/{now.files:,} files, {decimal(now.bytes_done)} of "
            f"{decimal(now.bytes)}, {decimal(int(rate))}/s, "
            f"{(now.bytes - now.bytes_done) / rate:.0f} s left"
        )

    yield report
