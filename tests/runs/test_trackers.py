"""The trackers themselves read back what was sent, and a resumed run goes on in the same one."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.runs import trackers
from clipft.runs.loggers import TrackerLogger
from clipft.runs.trackers import Tracker, check_installed, trackers_of


def step(number: int) -> Any:
    return SimpleNamespace(
        step=number, loss=float(number), lr=0.1, epoch=1, grad_norm=2.0, pairs=8, seconds=2.0
    )


def epoch(number: int) -> Any:
    recall = {"text_to_image": {"r@10": 0.5}, "image_to_text": {"r@10": 0.25}}
    return SimpleNamespace(step=number, epoch=1, val_loss=3.0, retrieval=recall)


def follow(settings: Settings, done_steps: int, steps: range) -> list[str]:
    """Do some steps of a run, and return what the user was told."""
    notes: list[str] = []
    (tracker,) = trackers_of(settings, settings.model_dump(mode="json"))
    logger = TrackerLogger(tracker, notes.append)
    logger.started(None, done_steps)
    for number in steps:
        logger.stepped(step(number))
    logger.epoch_ended(epoch(steps[-1]))
    logger.closed()
    return notes


def settings_of(tmp_path, name: str) -> Settings:
    settings = Settings(output_dir=tmp_path / "out", track=name)
    settings.run_dir.mkdir(parents=True)
    return settings


def killed_and_resumed(tmp_path, name: str) -> Settings:
    """A run that logged five steps, and was resumed after the third, up to the seventh."""
    settings = settings_of(tmp_path, name)
    assert follow(settings, 0, range(1, 6)) == []
    assert follow(settings, 3, range(4, 8)) == []
    return settings


def test_tensorboard_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = killed_and_resumed(tmp_path, "tensorboard")
    read = EventAccumulator(str(settings.run_dir / "tracking" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(n, n) for n in range(1, 8)]
    assert [e.step for e in read.Scalars("val/text_to_image/r@10")] == [7]
    assert "settings/text_summary" in read.Tags()["tensors"]


def test_mlflow_has_one_run_with_each_step_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    killed_and_resumed(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("clipft").experiment_id])
    sent = client.get_metric_history(run.info.run_id, "train/loss")
    steps = sorted((metric.step, metric.value) for metric in sent)
    # The last step before the kill is sent again, because its epoch may not have been
    assert list(dict.fromkeys(steps)) == [(n, n) for n in range(1, 8)] and len(steps) <= 8
    assert run.data.metrics["val/text_to_image/r_at_10"] == 0.5
    assert run.data.params["epochs"] == str(Settings().epochs)
    assert run.info.status == "FINISHED" and run.info.run_name == "dual_lora"


def test_trackio_goes_on_in_one_run_and_prints_nothing(tmp_path, monkeypatch, capfd):
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, __import__("trackio.sqlite_storage", fromlist=["x"])):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    settings = killed_and_resumed(tmp_path, "trackio")
    name = (settings.run_dir / "tracking" / "trackio").read_text()
    logs = SQLiteStorage.get_logs("clipft", name)
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert list(dict.fromkeys(losses)) == [(n, n) for n in range(1, 8)] and len(losses) <= 8
    assert capfd.readouterr().out == ""


class Broken(Tracker):
    title = "Broken"

    def log(self, step, figures):
        raise ConnectionError("no route to host")


class Silent(Tracker):
    """Never finishes, as one whose server does not answer."""

    title = "Silent"
    abandoned = False

    def finish(self, summary):
        threading.Event().wait(60)

    def abandon(self):
        Silent.abandoned = True


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Broken, "warning: Broken is off for this run: ConnectionError: no route to host"),
        (Silent, "warning: Silent has not finished after 0 s."),
    ],
)
def test_whatever_happens_to_a_tracker_is_one_warning(tmp_path, monkeypatch, kind, told):
    monkeypatch.setattr("clipft.runs.loggers._CLOSING_SECONDS", 0.2)
    monkeypatch.setitem(trackers._SERVICES, "tensorboard", (kind, "json"))
    assert follow(settings_of(tmp_path, "tensorboard"), 0, range(1, 4)) == [told]
    assert Silent.abandoned or kind is Broken


def test_trackers_are_named_once_and_wandb_keeps_its_own_setting():
    assert Settings().tracker_names == []
    assert Settings(track=" mlflow, tensorboard ,mlflow").tracker_names == ["mlflow", "tensorboard"]
    assert Settings(track="wandb,mlflow", wandb="offline").tracker_names == ["wandb", "mlflow"]
    with pytest.raises(ValueError, match="did you mean tensorboard"):
        Settings(track="tensorbord")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("clipft.runs.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--track mlflow needs the package mlflow") as refused:
        check_installed(["mlflow"])
    assert "clipft[track]" in refused.value.hint


def test_no_tracker_without_being_asked(tmp_path):
    assert trackers_of(Settings(output_dir=tmp_path), json.loads("{}")) == []
