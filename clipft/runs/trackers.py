"""The services that can follow a run: W&B, TensorBoard, MLflow and Trackio.

Each has a class with the same three methods, called from one thread in this order: ``open``, which
also continues an earlier run, ``log`` for each step and epoch, and ``finish``. They may raise any
error: ``loggers.TrackerLogger`` catches it, so that training continues.
"""

import importlib.util
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.core.files import write_text
from clipft.runs.folder import RunPaths

Figures = dict[str, float]
"""Numbers by name, such as ``train/loss``. A slash puts a name into a group."""

_MOST_CHARACTERS = 500
"""MLflow warns of longer values of a setting, or refuses them."""


class Tracker:
    """Base class of the services. ``config`` holds the settings of the run."""

    title = ""

    def __init__(self, settings: Settings, config: dict[str, Any]) -> None:
        self.settings, self.config = settings, config
        self.paths = RunPaths(settings.run_dir)

    def open(self, done_steps: int) -> None:
        """Begin the run, or continue it after ``done_steps`` steps."""

    def log(self, step: int, figures: Figures) -> None:
        """Add the figures of a step."""

    def finish(self, summary: Figures) -> None:
        """Add the figures of the report, and end."""

    def abandon(self) -> None:
        """Stop everything that would keep this process from ending."""


class Wandb(Tracker):
    """Weights & Biases; a resumed run goes on under the same id."""

    title = "W&B"

    def open(self, done_steps: int) -> None:
        import wandb

        if not self.paths.wandb_id.exists():
            write_text(self.paths.wandb_id, secrets.token_hex(4))
        mode = self.settings.wandb
        self.run = wandb.init(
            project=self.settings.wandb_project,
            mode="online" if mode == "disabled" else mode,
            id=self.paths.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self.paths.folder),
            config=self.config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, figures: Figures) -> None:
        self.run.log(figures, step=step)

    def finish(self, summary: Figures) -> None:
        self.run.summary.update(summary)
        self.run.finish()

    def abandon(self) -> None:
        # At exit, Python would wait minutes for wandb's process
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith("wandb"):
                    child.kill()


class TensorBoard(Tracker):
    """Writes TensorBoard's files into the run folder."""

    title = "TensorBoard"

    def open(self, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A killed run may have logged steps after its checkpoint, which are done again now
        purge = done_steps + 1 if done_steps else None
        self.writer = SummaryWriter(str(self.paths.tracking / "tensorboard"), purge_step=purge)
        self.step = done_steps
        if not done_steps:
            rows = "".join(f"| {name} | {value} |\n" for name, value in self.config.items())
            self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", 0)

    def log(self, step: int, figures: Figures) -> None:
        self.step = step
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, summary: Figures) -> None:
        self.log(self.step, {f"summary/{name}": value for name, value in summary.items()})
        self.writer.close()


class MLflow(Tracker):
    """MLflow, at the server of MLFLOW_TRACKING_URI or wherever MLflow puts runs without it."""

    title = "MLflow"

    def open(self, done_steps: int) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.first = 0
        if known := kept_id(self.paths, "mlflow"):
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            # Figures of one step are not sent twice, because MLflow would keep both
            sent = self.client.get_metric_history(self.id, "train/loss")
            self.first = max((metric.step for metric in sent), default=0)
            return
        experiment = self.client.get_experiment_by_name(self.settings.track_project)
        where = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(self.settings.track_project)
        )
        self.id = self.client.create_run(where, run_name=self.settings.scenario).info.run_id
        keep_id(self.paths, "mlflow", self.id)
        for name, value in self.config.items():
            self.client.log_param(self.id, name, str(value)[:_MOST_CHARACTERS])

    def log(self, step: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        if step < self.first:
            return
        now = round(time.time() * 1000)
        # r@10 would be refused as a name
        sent = [Metric(n.replace("@", "_at_"), v, now, step) for n, v in figures.items()]
        self.client.log_batch(self.id, metrics=sent)
        self.last = step

    def finish(self, summary: Figures) -> None:
        self.log(self.last, {f"summary/{name}": value for name, value in summary.items()})
        self.client.set_terminated(self.id)


class Trackio(Tracker):
    """Trackio, on this machine or in a Space, as its own environment variables say."""

    title = "Trackio"

    def open(self, done_steps: int) -> None:
        import trackio

        run_name = kept_id(self.paths, "trackio")
        if not run_name:
            run_name = f"{self.settings.scenario}-{secrets.token_hex(4)}"
            keep_id(self.paths, "trackio", run_name)
        for module in (name for name in sys.modules if name.partition(".")[0] == "trackio"):
            # It greets the user at some length. A name of the module hides the built-in function
            sys.modules[module].print = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        self.run: Any = trackio.init(
            project=self.settings.track_project,
            name=run_name,
            resume="allow",
            config=self.config,
            embed=False,
        )
        # The last step that it has; earlier ones are not sent twice, because it would keep both
        self.first = getattr(self.run, "_next_step", 1) - 1

    def log(self, step: int, figures: Figures) -> None:
        if step >= self.first:
            self.run.log(figures, step=step)
            self.last = step

    def finish(self, summary: Figures) -> None:
        self.log(self.last, {f"summary/{name}": value for name, value in summary.items()})
        self.run.finish()


def kept_id(paths: RunPaths, name: str) -> str | None:
    """Return the id under which a service knows the run, None if it does not know it yet."""
    path = paths.tracking / name
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def keep_id(paths: RunPaths, name: str, known_as: str) -> None:
    """Keep the id under which a service knows the run, for when the run is resumed."""
    paths.tracking.mkdir(exist_ok=True)
    write_text(paths.tracking / name, known_as)


_SERVICES: dict[str, tuple[type[Tracker], str]] = {
    "wandb": (Wandb, "wandb"),
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}
"""The services by the names of ``--track``, and the module that each needs."""


def trackers_of(settings: Settings, config: dict[str, Any]) -> list[Tracker]:
    """Return the services that the settings name."""
    return [_SERVICES[name][0](settings, config) for name in settings.tracker_names]


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of these services are there.

    Raises:
        UsageError: one of them is missing.
    """
    for name in names:
        module = _SERVICES[name][1]
        if importlib.util.find_spec(module) is None:
            extra = "trackio" if name == "trackio" else "track"
            raise UsageError(
                f"--track {name} needs the package {module}",
                f"install it: pip install 'clipft[{extra}]', or pipx inject clipft {module}",
            )
