"""Running an ablation's runs, each in a process of its own, so that none ends the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.ablation.grid import PlannedRun, settings_in_common
from clipft.config.sources import ENV_OTHERS, ENV_PREFIX
from clipft.config.text import beside_defaults
from clipft.core.errors import Interrupted, UsageError
from clipft.core.files import read_json, write_json, write_text
from clipft.runs.folder import read_run
from clipft.training.signals import stop_on_signals

_POLL = 0.05
_LOG_LINES = 5


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``error`` and ``hint`` are its own words; both empty: it is finished."""

    run: PlannedRun
    exit_code: int
    error: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Callbacks:
    started: Callable[[PlannedRun], None]
    ended: Callable[[Outcome], None]


@dataclass(frozen=True)
class _Process:
    run: PlannedRun
    popen: "subprocess.Popen[bytes]"
    slot: int


def run_all(runs: Sequence[PlannedRun], jobs: int, lock: int, callbacks: Callbacks) -> str | None:
    """Run those that are not finished, ``jobs`` at a time; the name of the signal that stopped
    it, if one did: the runs under way have then saved their state and ended.

    ``lock`` is the descriptor of the ablation's lock: the processes hold it too, so that no
    second ablation starts beside them where this one is killed.
    """
    waiting = deque(run for run in runs if not run.finished)
    alive: list[_Process] = []
    places = _places(jobs)
    with stop_on_signals() as stop:
        told = False
        try:
            while alive or (waiting and not stop.name):
                while waiting and len(alive) < jobs and not stop.name:
                    slot = min(set(range(jobs)) - {process.slot for process in alive})
                    run = waiting.popleft()
                    callbacks.started(run)
                    alive.append(_Process(run, _start(run, places[slot], lock), slot))
                time.sleep(_POLL)
                if stop.name and not told:
                    told = True
                    _ask_to_stop(alive)
                for process in [p for p in alive if p.popen.poll() is not None]:
                    alive.remove(process)
                    if not (stop.name and _stopped(process)):
                        callbacks.ended(_outcome(process))
        finally:  # a second Ctrl-C, or a bug
            for process in alive:
                process.popen.kill()
    return stop.name


def _ask_to_stop(processes: Sequence[_Process]) -> None:
    """The runs then save their state and end."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.popen.send_signal(signal.SIGTERM)


def _stopped(process: _Process) -> bool:
    """It ended because it was asked to: with its state saved, or before there was any."""
    return process.popen.returncode in (Interrupted.exit_code, -signal.SIGTERM)


def _start(run: PlannedRun, place: dict[str, str], lock: int) -> "subprocess.Popen[bytes]":
    write_text(run.config, run.settings.to_toml())
    train = ["train", "--config", str(run.config), "--resume-from-checkpoint", "--json"]
    # Settings of the environment are in the file by now, where the run's own are stronger
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX) or k in ENV_OTHERS}
    kept.pop("CLIPFT_CONFIG", None)
    with run.log.open("ab") as log, _answer(run).open("wb") as answer:
        return subprocess.Popen(
            [sys.executable, "-m", "clipft", *train],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=log,
            env={**kept, **place},
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once
        )


def _answer(run: PlannedRun) -> Path:
    return run.home / "answer.json"


def _outcome(process: _Process) -> Outcome:
    run, code = process.run, process.popen.returncode
    if code == 0:
        return Outcome(run, 0)
    if code < 0:
        name = signal.Signals(-code).name
        hint = "often it is out of memory: set --micro-batch-size, or fewer --jobs"
        return Outcome(run, 128 - code, f"killed by {name}", hint)
    said = _said(_answer(run))
    error = said.get("message") or _last_lines(run.log)
    return Outcome(run, code, error, said.get("hint") or f"see {run.log}")


def _said(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(json.loads(lines[-1])["error"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " ".join(lines[-_LOG_LINES:]) or "it said nothing"


def _places(jobs: int) -> list[dict[str, str]]:
    """Variables of the environment for each of ``jobs`` beside each other: GPUs in turn, and
    without a GPU a share of the processors each, where the user has not said otherwise."""
    if jobs == 1:
        return [{}]
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = named if len(named) == count else [str(number) for number in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": gpus[job % count]} for job in range(jobs)]
    if count or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}] * jobs


STATE = "ablation.json"


def write_state(folder: Path, runs: Sequence[PlannedRun], ended: Mapping[Path, Outcome]) -> None:
    """``ended`` is by the run's folder; a run that is neither in it nor finished waits."""
    content = {
        "format_version": 1,
        "settings": beside_defaults(settings_in_common(runs)),
        "runs": [_entry(folder, run, ended.get(run.folder)) for run in runs],
    }
    write_json(folder / STATE, content, indent=1)


def _entry(folder: Path, run: PlannedRun, outcome: Outcome | None) -> dict[str, Any]:
    failed = outcome is not None and outcome.exit_code != 0
    return {
        "variant": run.variant,
        "scenario": run.settings.values.scenario,
        "varied": run.varied,
        "seed": run.seed,
        "folder": str(run.folder.relative_to(folder.resolve())),
        "state": "finished" if run.finished else "failed" if failed else "waiting",
        "exit_code": outcome.exit_code if outcome and failed else None,
        "error": outcome.error if outcome and failed else None,
        "hint": outcome.hint if outcome and failed else None,
    }


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``ablation.json``, each run with what it left: ``before`` and ``after``
    (retrieval; None: no epoch was better), ``epochs``, ``plan``, time and memory.

    Raises:
        UsageError: no ablation is there, or its files are not clipft's.
    """
    state = read_json(folder / STATE)
    if state is None or "runs" not in state:
        raise UsageError(f"no ablation in {folder}", "name the folder of one")
    for run in state["runs"]:
        run |= _left(folder / run["folder"]) if run["state"] == "finished" else {}
    return state


def _left(folder: Path) -> dict[str, Any]:
    records = read_run(folder)
    assert records.result
    kept = ("before", "after", "best_epoch", "steps", "stopped_early", "skipped_pairs")
    return {
        **{name: records.result[name] for name in kept},
        "epochs": records.epochs,
        "evaluation": records.evaluation,
        "plan": records.run.get("plan"),
        "environment": records.run.get("environment", {}),
        "seconds": records.run.get("seconds"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
    }
