"""The folder of a run: its files, its lock, and reading it afterwards.

{output_dir}/{scenario}_checkpoint.pt    all that resume needs; .previous.pt is the one before it
{output_dir}/{scenario}/settings.toml    the settings of the run
                        metrics.jsonl    a line per optimizer step and per epoch
                        skipped.jsonl    pairs that could not be used, and why
                        best.pt          the weights of the best epoch
                        adapter/         the same weights as a PEFT adapter (LoRA scenarios)
                        result.json      figures before and after
                        evaluation.json  all figures, with intervals and differences
                        run.json         the plan, versions and device, time and memory
                        rankings-before.json, rankings-best.json   top images of some captions
                        kept.json, interpolation.json   what `clipft evaluate` was asked to add
                        judgments.jsonl  what people judged blind in `clipft browse`
                        report.html, report.json   all of it for people, and for programs
{output_dir}/{scenario}.earlier-1/       an earlier run that a new one replaced
"""

import fcntl
import json
import os
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from clipft.config.scenarios import CHECKPOINT_SUFFIX
from clipft.config.settings import SECTIONS, Settings, beside_defaults
from clipft.core.errors import StorageError, UsageError, first_line
from clipft.core.files import did_you_mean_path, disk_error, json_lines, read_json, write_text
from clipft.runs.judgments import Tally, read_judgments
from clipft.runs.records import RunRecords

_LOCK = ".lock"
_MAX_SKIPPED = 50
"""How many skipped pairs a report lists."""


class RunPaths:
    """The paths of a run's files, given its folder ``{output_dir}/{scenario}``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder.with_name(f"{folder.name}{CHECKPOINT_SUFFIX}")
        self.best = folder / "best.pt"
        self.adapter = folder / "adapter"
        self.settings = folder / "settings.toml"
        self.metrics = folder / "metrics.jsonl"
        self.skipped = folder / "skipped.jsonl"
        self.record = folder / "run.json"
        self.wandb_id = folder / "wandb_id"
        self.tracking = folder / "tracking"
        self.rankings_before = folder / "rankings-before.json"
        self.rankings_best = folder / "rankings-best.json"
        self.evaluation = folder / "evaluation.json"
        # A run writes its result last: if the result exists, so does everything else
        self.result = folder / "result.json"
        self.kept = folder / "kept.json"
        self.interpolation = folder / "interpolation.json"
        self.judgments = folder / "judgments.jsonl"
        self.soup = folder / "soup.json"
        self.report = folder / "report.html"

    def contents(self) -> list[Path]:
        """List all files and folders that a run may leave in its folder."""
        within = [path for path in vars(self).values() if path.parent == self.folder]
        return [*within, self.report.with_suffix(".json")]

    def unused_earlier(self) -> Path:
        """Return a folder name, not used yet, for a run that a new one replaces."""
        numbered = (self.folder.with_name(f"{self.folder.name}.earlier-{n}") for n in count(1))
        return next(folder for folder in numbered if not folder.exists())


@contextmanager
def run_lock(folder: Path) -> Iterator[int]:
    """Lock ``folder`` against other runs, and yield the file descriptor of the lock.

    A process that inherits the descriptor holds the lock too. The system releases the lock even if
    the process is killed.

    Raises:
        StorageError: The folder cannot be made or written to.
        UsageError: Another run holds the lock.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror}", "choose a writable --output-dir"
        ) from error
    with file:
        _take_lock(file, path)
        # Decoding processes run for some seconds after a run is killed, and must not keep its lock
        os.register_at_fork(after_in_child=file.close)
        file.truncate(0)
        file.write(f"process {os.getpid()}, started {time.strftime('%F %T')}")
        file.flush()
        yield file.fileno()


def check_unlocked(folder: Path) -> None:
    """Check that no other run is in progress in ``folder``. No file is created.

    Raises:
        UsageError: Another run holds the lock.
    """
    path = folder / _LOCK
    if path.exists():
        with path.open(encoding="utf-8") as file:
            _take_lock(file, path)


def _take_lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8") or "another process"
        raise UsageError(
            f"a run is already in progress in {path.parent} ({holder})",
            "wait for it, stop it, or choose another --output-dir",
        ) from None


def append_lines(path: Path, records: list[dict[str, Any]], ascii_only: bool = False) -> None:
    """Append records to a JSONL file. Without records no file is made.

    Raises:
        StorageError: The disk is full or refuses to write.
    """
    if not records:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records
            )
    except OSError as error:
        raise disk_error(path, error) from error


def cut_lines(path: Path, done_steps: int, done_epochs: int) -> None:
    """Remove the lines of later steps and epochs; a resumed run writes them again."""
    if not path.exists():
        return

    def is_done(line: str) -> bool:
        try:
            record: dict[str, Any] = json.loads(line)
            if record.get("kind") == "epoch" and int(record["epoch"]) > done_epochs:
                return False
            return int(record["step"]) <= done_steps
        except (ValueError, KeyError, TypeError):  # a kill or a full disk cut off this line
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    write_text(path, "".join(f"{line}\n" for line in lines if is_done(line)))


def run_settings(folder: Path) -> Settings:
    """Return the settings of a run, read from its folder.

    Raises:
        UsageError: There is no run in the folder, or its settings file was changed.
    """
    paths = RunPaths(folder)
    if not _holds_run(folder):
        near = _run_near(folder)
        hint = f"did you mean {near}?" if near else did_you_mean_path(folder)
        what = (
            f"{folder} is a file, not a run folder" if folder.is_file() else f"no run in {folder}"
        )
        raise UsageError(what, hint or "name the folder that has its metrics.jsonl in it")
    try:
        return Settings(**tomllib.loads(paths.settings.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{paths.settings} was changed after the run wrote it: {first_line(error)}",
            "restore the original file",
        ) from error


def _holds_run(folder: Path) -> bool:
    paths = RunPaths(folder)
    return paths.settings.is_file() and paths.metrics.is_file()


def _run_near(place: Path) -> Path | None:
    """Return the run that a file belongs to, or the newest of the runs in a folder."""
    if place.is_file():
        own = place.with_name(place.name.removesuffix(CHECKPOINT_SUFFIX))
        return next((folder for folder in (place.parent, own) if _holds_run(folder)), None)
    within = [path.parent for path in place.glob("*/metrics.jsonl") if _holds_run(path.parent)]
    return max(within, key=lambda run: (run / "metrics.jsonl").stat().st_mtime, default=None)


def read_run(folder: Path) -> RunRecords:
    """Read everything that a run left in its folder, except for weights and rankings.

    Raises:
        UsageError: There is no run in the folder, or a file of it cannot be read.
    """
    settings, paths = run_settings(folder), RunPaths(folder)
    values = settings.model_dump(mode="json")
    metrics, skipped = json_lines(paths.metrics), json_lines(paths.skipped)
    epochs = [line for line in metrics if line.get("kind") == "epoch"]
    improved = [line["epoch"] for line in epochs if line.get("improved")]

    def read(path: Path) -> dict[str, Any] | None:
        content = read_json(path)
        if content is None and path.exists():
            raise UsageError(f"{path} is not a readable JSON file", "remove it")
        return content

    return RunRecords(
        folder=str(folder),
        settings=[
            {"section": section.title, **described}
            for section in SECTIONS
            for described in beside_defaults({name: values[name] for name in section.model_fields})
        ],
        run=read(paths.record) or {},
        steps=[line for line in metrics if line.get("kind") == "step"],
        epochs=epochs,
        result=read(paths.result),
        evaluation=read(paths.evaluation),
        interpolation=read(paths.interpolation),
        kept=read(paths.kept),
        judgments=Tally.of(read_judgments(paths.judgments, improved[-1] if improved else 0)),
        skipped=skipped[:_MAX_SKIPPED],
        skipped_counts=dict(Counter(str(entry.get("split", "train")) for entry in skipped)),
    )
