"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from clipft.cli.console import Output, say
from clipft.cli.tables import DIRECTIONS
from clipft.core.common import counted, duration
from clipft.runs.records import EpochResult, Plan, StepResult, TrainingCallback

if TYPE_CHECKING:
    from clipft.storage.sync.download import TransferProgress

_STEPS_EVERY, _TRANSFERS_EVERY = 10.0, 5.0
"""Seconds between progress lines where nothing can move."""
_BAR_AND_TIME = 20
"""Columns reserved for the bar and the time left."""
_ROW_WIDTH = 80
"""Columns of a row in the table of epochs, ``best so far`` included."""

_RECALLS_HEAD = f"  {'R@1':>7}{'R@10':>7}"
_EPOCHS_HEAD = (
    f"{'':15}{'loss':>18}  " + "  ".join(f"{label:>14}" for label in DIRECTIONS.values()),
    f"{'':15}{'train':>9}{'val':>9}{_RECALLS_HEAD * len(DIRECTIONS)}",
)


def make_progress(console: Console, memory: Callable[[], int]) -> TrainingCallback:
    """Choose the display that fits ``console``; ``memory`` returns the bytes in use."""
    kind = LiveProgress if console.is_interactive else PlainProgress
    return kind(console, memory)


@dataclass
class Pace:
    """Running means of a run's speed, so that the figures shown do not jump from step to step."""

    seconds_per_step: float = 0.0
    pairs_per_s: float = 0.0
    data_share: float = 0.0
    """Share of the time spent waiting for data, 0 to 1."""

    def add(self, result: StepResult) -> None:
        """Take one more step into the means; the first step sets them."""
        seconds = max(result.seconds, 1e-9)
        weight = 0.1 if self.seconds_per_step else 1.0
        self.seconds_per_step += weight * (seconds - self.seconds_per_step)
        self.pairs_per_s += weight * (result.pairs / seconds - self.pairs_per_s)
        self.data_share += weight * (result.data_seconds / seconds - self.data_share)


class PlainProgress(TrainingCallback):
    """Print the plan, a line at the first step and then every ten seconds, a line each epoch."""

    def __init__(self, console: Console, memory: Callable[[], int]) -> None:
        self._console, self._memory = console, memory
        self._plan: Plan | None = None
        self._pace = Pace()
        self._has_head = False
        self._last = float("-inf")

    def started(self, plan: Plan, done_steps: int) -> None:
        self._plan = plan
        for line in plan_lines(plan):
            say(self._console, line)

    def stepped(self, result: StepResult) -> None:
        assert self._plan
        self._pace.add(result)
        now = time.monotonic()
        if now - self._last < _STEPS_EVERY:
            return
        self._last = now
        left = self._pace.seconds_per_step * (self._plan.total_steps - result.step)
        figures = " ".join(step_figures(result, self._pace, self._memory()))
        say(
            self._console,
            f"epoch {result.epoch}/{self._plan.epochs} "
            f"step {result.step}/{self._plan.total_steps} "
            f"{' '.join(figures.split())} {duration(left)} left",
        )

    def epoch_ended(self, result: EpochResult) -> None:
        epochs = self._plan.epochs if self._plan else 0
        if not self._console.is_interactive or self._console.width < _ROW_WIDTH:
            say(self._console, epoch_line(result, epochs))
            return
        if not self._has_head:
            self._has_head = True
            if result.val_floor:
                say(
                    self._console,
                    "note: no model can have a validation loss below "
                    f"{result.val_floor:.4f} on these pairs.",
                )
            self._console.print(Text("\n".join(_EPOCHS_HEAD), style="bold"), soft_wrap=True)
        say(self._console, epoch_row(result, epochs))


class LiveProgress(PlainProgress):
    """Show a bar with the step's figures beside it, and the epochs as a table above it."""

    def __init__(self, console: Console, memory: Callable[[], int]) -> None:
        super().__init__(console, memory)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", justify="right"),
            # The time left is the one column that must not be cut on a narrow terminal
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
        figures = step_figures(result, self._pace, self._memory())
        # The least important figures give way to the bar
        while len(figures) > 1 and (
            len(done) + len("  ".join(figures)) + _BAR_AND_TIME > self._console.width
        ):
            figures.pop()
        self._progress.update(self._task, advance=1, description=done, figures="  ".join(figures))

    def closed(self) -> None:
        self._progress.stop()


def plan_lines(plan: Plan) -> list[str]:
    """Describe a run's plan in two or three sentences, followed by its notes."""
    lines = [
        f"{plan.scenario} on {plan.model}: {plan.parameters}.",
        f"{counted(plan.train_pairs, 'training pair')}, "
        f"{counted(plan.val_pairs, 'validation pair')}; {plan.device}, {plan.precision}.",
    ]
    if plan.total_steps:
        across = f" across {plan.processes} processes" if plan.processes > 1 else ""
        lines.append(
            f"{counted(plan.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')} with "
            f"{counted(plan.effective_batch_size, 'pair')} each "
            f"(micro-batches of {plan.micro_batch_size}{across}), "
            f"{counted(plan.warmup_steps, 'warm-up step')}, {plan.optimizer}."
        )
    return lines + [f"note: {note}." for note in plan.notes]


def step_figures(result: StepResult, pace: Pace, memory: int) -> list[str]:
    """Format a step's figures, the most important first.

    Their widths stay the same from step to step, so that a bar beside them does not jump.
    """
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
    """Describe an epoch in one line that needs no heading."""
    train = f" train loss {result.train_loss:.4f}" if result.train_loss is not None else ""
    bound = f" (lower bound {result.val_floor:.4f})" if result.val_floor else ""
    recalls = ""
    for direction, label in DIRECTIONS.items():
        figures = result.retrieval[direction]
        recalls += f"  {label} R@1 {figures['r@1']:.1%} R@10 {figures['r@10']:.1%}"
    if result.accuracy is not None:
        recalls += f"  accuracy {result.accuracy:.1%}"
    if result.look_alike_seconds is not None:
        recalls += f"  look-alikes {result.look_alike_seconds:.1f} s"
    best = "  best so far" if result.improved else ""
    return (
        f"{_epoch_label(result, epochs)}:{train} val loss {result.val_loss:.4f}{bound}"
        f"{recalls}{best}"
    )


def epoch_row(result: EpochResult, epochs: int) -> str:
    """Format an epoch as a row of the table of epochs, in the columns of its heading."""
    train = f"{result.train_loss:.4f}" if result.train_loss is not None else ""
    recalls = ""
    for direction in DIRECTIONS:
        figures = result.retrieval[direction]
        recalls += f"  {figures['r@1']:>7.1%}{figures['r@10']:>7.1%}"
    best = "  best so far" if result.improved else ""
    if result.accuracy is not None:  # all within 80 columns
        recalls += f"  acc {result.accuracy:.1%}"
        best = "  best" if result.improved else ""
    return f"{_epoch_label(result, epochs):15}{train:>9}{result.val_loss:>9.4f}{recalls}{best}"


def _epoch_label(result: EpochResult, epochs: int) -> str:
    return f"epoch {result.epoch}/{epochs}" if result.epoch else "pretrained"


@contextmanager
def transfer_progress(out: Output) -> Iterator[Callable[["TransferProgress"], None]]:
    """Show a sync with a bucket: a bar on a terminal, a line every few seconds elsewhere.

    Call what this yields whenever something has arrived.
    """
    if out.err.is_interactive:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=out.err,
            transient=True,
        ) as bar:
            task = bar.add_task("listing", total=None)

            def update(now: "TransferProgress") -> None:
                files = f"{now.files_done:,}/{now.files:,} files"
                bar.update(task, description=files, completed=now.bytes_done, total=now.bytes)

            yield update
        return
    start = last = time.monotonic()

    def print_line(now: "TransferProgress") -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last < _TRANSFERS_EVERY:
            return
        last = clock
        rate = max(now.bytes_done, 1) / (clock - start)
        out.note(
            f"{now.files_done:,}/{now.files:,} files, {decimal(now.bytes_done)} of "
            f"{decimal(now.bytes)}, {decimal(int(rate))}/s, "
            f"{(now.bytes - now.bytes_done) / rate:.0f} s left"
        )

    yield print_line
