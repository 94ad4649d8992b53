"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from clipft.records import EpochResult, Observer, Plan, StepResult

_PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""

Memory = Callable[[], int]
"""Bytes in use."""


def make_progress(console: Console, memory: Memory) -> Observer:
    """The display that fits ``console``."""
    kind = LiveProgress if console.is_terminal else PlainProgress
    return kind(console, memory)


class _Lines:
    """The lines both displays share: the plan at the start, figures at each epoch's end."""

    def __init__(self, console: Console, memory: Memory) -> None:
        self._console, self._memory = console, memory
        self._plan: Plan | None = None
        self._pace = Pace()

    def started(self, plan: Plan, done_steps: int) -> None:
        self._plan = plan
        for line in plan_lines(plan):
            self._say(line)

    def epoch_ended(self, result: EpochResult) -> None:
        self._say(epoch_line(result, self._plan.epochs if self._plan else 0))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)


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
                self._task, total=plan.total_steps, completed=done_steps, figures="", visible=True
            )

    def stepped(self, result: StepResult) -> None:
        assert self._plan
        self._pace.add(result)
        epoch = f"epoch {result.epoch}/{self._plan.epochs}"
        self._progress.update(
            self._task,
            advance=1,
            description=f"{epoch} step {result.step}/{self._plan.total_steps}",
            figures=step_figures(result, self._pace, self._memory()),
        )

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
        self._say(
            f"epoch {result.epoch}/{self._plan.epochs} "
            f"step {result.step}/{self._plan.total_steps} "
            f"{step_figures(result, self._pace, self._memory())} {duration(left)} left"
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
        f"{plan.train_pairs:,} training pairs, {plan.val_pairs:,} validation pairs; "
        f"{plan.device}, {plan.precision}.",
    ]
    if plan.total_steps:
        epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
        among = f" over {plan.processes} processes" if plan.processes > 1 else ""
        lines.append(
            f"{epochs} x {plan.steps_per_epoch} steps of "
            f"{plan.effective_batch_size} pairs (micro-batches of {plan.micro_batch_size}{among}), "
            f"warm-up {plan.warmup_steps} steps, {plan.optimizer}."
        )
    return lines + [f"note: {note}." for note in plan.notes]


def step_figures(result: StepResult, pace: Pace, memory: int) -> str:
    text = (
        f"loss {result.loss:.4f} lr {result.lr:.2e} "
        f"{pace.pairs_per_s:.0f} pairs/s {memory / 2**30:.1f} GiB wait {pace.data_share:.0%}"
    )
    return text if result.applied else f"{text} (gradient not finite: skipped)"


def epoch_line(result: EpochResult, epochs: int) -> str:
    label = f"epoch {result.epoch}/{epochs}" if result.epoch else "untouched model"
    train = f" train loss {result.train_loss:.4f}" if result.train_loss is not None else ""
    recalls = "  ".join(
        f"{name} R@1 {figures['r@1']:.1%} R@10 {figures['r@10']:.1%}"
        for name, figures in (
            ("text->image", result.retrieval["text_to_image"]),
            ("image->text", result.retrieval["image_to_text"]),
        )
    )
    best = "  best so far" if result.improved else ""
    floor = f" (floor {result.val_floor:.4f})" if result.val_floor else ""
    return f"{label}:{train} val loss {result.val_loss:.4f}{floor}  {recalls}{best}"


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
