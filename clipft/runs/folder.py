"""The folder of a run: one run at a time, and metrics without gaps or repeats.

{output_dir}/{scenario}_checkpoint.pt    all that resume needs; .previous.pt the one before
{output_dir}/{scenario}/settings.toml    the settings as they were used
                        metrics.jsonl    a line per optimizer step and per epoch
                        skipped.jsonl    pairs that could not be used, and why
                        best.pt          the weights of the best epoch
                        adapter/         them again as a PEFT adapter (LoRA scenarios)
                        result.json      figures before and after
                        evaluation.json  all of them, with intervals and differences
                        run.json         the plan, versions and device, time and memory
                        rankings-before.json, rankings-best.json   first pictures of some captions
                        kept.json, interpolation.json   what `clipft evaluate` was asked for besides
                        report.html, report.json   all of it for people, and for programs
{output_dir}/{scenario}.earlier-1/       all of a run that a new one took the place of
"""

import fcntl
import json
import os
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pydantic import ValidationError

from clipft.config.fields import fields_of
from clipft.config.settings import SECTIONS, Settings
from clipft.core.errors import StorageError, UsageError, first_line
from clipft.core.files import disk_error, json_lines, write_text
from clipft.runs.records import RunRecords


@dataclass(frozen=True)
class RunPaths:
    checkpoint: Path
    folder: Path

    @classmethod
    def of(cls, settings: Settings) -> "RunPaths":
        return cls(settings.checkpoint_path, settings.run_dir)

    @classmethod
    def within(cls, folder: Path) -> "RunPaths":
        """Of a run whose folder is known."""
        return cls(folder.with_name(f"{folder.name}_checkpoint.pt"), folder)

    @property
    def settings(self) -> Path:
        return self.folder / "settings.toml"

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def earlier(self) -> Path:
        """A folder that is not there yet, for all of this run when a new one takes its place."""
        numbered = (self.folder.with_name(f"{self.folder.name}.earlier-{n}") for n in count(1))
        return next(folder for folder in numbered if not folder.exists())

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        return self.folder / "skipped.jsonl"

    @property
    def record(self) -> Path:
        return self.folder / "run.json"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def result(self) -> Path:
        """What a run writes last: it is there when all the rest is."""
        return self.folder / "result.json"

    @property
    def kept(self) -> Path:
        return self.folder / "kept.json"

    @property
    def interpolation(self) -> Path:
        return self.folder / "interpolation.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def contents(self) -> tuple[Path, ...]:
        """All that a run may leave in its folder."""
        weights = (self.best, self.adapter, self.rankings_before, self.rankings_best)
        told = (self.settings, self.record, self.metrics, self.skipped, self.wandb_id)
        figures = (self.result, self.evaluation, self.kept, self.interpolation)
        return *weights, *told, *figures, self.report, self.report.with_suffix(".json")

    @property
    def wandb_id(self) -> Path:
        """Of the W&B run, which a resumed run goes on with."""
        return self.folder / "wandb_id"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def rankings_before(self) -> Path:
        return self.folder / "rankings-before.json"

    @property
    def rankings_best(self) -> Path:
        return self.folder / "rankings-best.json"


class RunLock:
    """Keeps a second run out of the folder; the system releases it however this one ends.

    Raises:
        StorageError: the folder cannot be made or written.
        UsageError: another run holds it.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._path = paths.folder / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write to {self._path.parent}: {error.strerror}",
                "choose a writable --output-dir",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held() from None
        # Decoding processes outlive a killed run by seconds: they must not hold its lock
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}, started {time.strftime('%F %T')}")
        self._file.flush()
        return self

    @property
    def descriptor(self) -> int:
        """Of the file: a process that inherits it holds the lock too."""
        assert self._file
        return self._file.fileno()

    def _held(self) -> UsageError:
        holder = self._path.read_text(encoding="utf-8") or "another process"
        if self._file:
            self._file.close()
        return UsageError(
            f"a run is under way in {self._path.parent} ({holder})",
            "wait for it, stop it, or choose another --output-dir",
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()


def cut_lines(path: Path, done_steps: int, done_epochs: int) -> None:
    """Drop the lines of what comes after so many steps, and validations of epochs: the resumed
    run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for line in lines if _done(line, done_steps, done_epochs)]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _done(line: str, done_steps: int, done_epochs: int) -> bool:
    try:
        record: dict[str, Any] = json.loads(line)
        if record.get("kind") == "epoch" and int(record["epoch"]) > done_epochs:
            return False
        return int(record["step"]) <= done_steps
    except (ValueError, KeyError, TypeError):  # a kill or a full disk cut this line
        return False


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records to a JSONL file; none: no file is made."""
    if not records:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise disk_error(path, error) from error


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
