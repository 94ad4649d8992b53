"""Starts the runs of an ablation, each in its own process, so that a failure affects no other."""

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
from clipft.config.settings import beside_defaults
from clipft.config.sources import ENV_OTHERS, ENV_PREFIX
from clipft.core.errors import Interrupted, UsageError
from clipft.core.files import read_json, write_json, write_text
from clipft.data.shards.names import tars_in
from clipft.runs.folder import read_run
from clipft.training.signals import stop_on_signals

STATE = "ablation.json"
TEST = "test.json"
"""The file in ``home`` with the figures of a finished run's best epoch on the test pairs."""
_ANSWER = "answer.json"
"""The file with the stdout of a run: its result or its error as JSON."""
_POLL_SECONDS = 0.05
_LOG_LINES = 5


@dataclass(frozen=True)
class Outcome:
    """The end of a run. ``error`` and ``hint`` are the run's messages, and empty if it finished."""

    run: PlannedRun
    exit_code: int
    error: str = ""
    hint: str = ""


@dataclass(frozen=True)
class _Process:
    run: PlannedRun
    popen: "subprocess.Popen[bytes]"
    slot: int


def run_all(
    runs: Sequence[PlannedRun],
    jobs: int,
    lock: int,
    on_start: Callable[[PlannedRun], None],
    on_end: Callable[[Outcome], None],
) -> str | None:
    """Start the runs that have not finished, ``jobs`` at a time, and wait for them.

    After a signal, current runs are asked to save their state, and no others are started.

    Args:
        runs: the ablation's runs.
        jobs: the number of processes at a time.
        lock: file descriptor of the ablation's lock. The processes inherit it, so that no second
            ablation can start beside them if this process is killed.
        on_start: called in this process when a run starts.
        on_end: called in this process when a run ends, unless the run ended because the ablation
            was stopped.

    Returns:
        The name of the signal that stopped the ablation, or None.
    """
    waiting = deque(run for run in runs if not run.finished)
    alive: list[_Process] = []
    of_slots = environments(jobs)
    with stop_on_signals() as stop:
        asked = False
        try:
            while alive or (waiting and not stop.name):
                while waiting and len(alive) < jobs and not stop.name:
                    slot = min(set(range(jobs)) - {process.slot for process in alive})
                    run = waiting.popleft()
                    on_start(run)
                    alive.append(_Process(run, _start(run, of_slots[slot], lock), slot))
                time.sleep(_POLL_SECONDS)
                if stop.name and not asked:
                    asked = True
                    for process in alive:
                        with suppress(ProcessLookupError):
                            process.popen.send_signal(signal.SIGTERM)
                for process in [p for p in alive if p.popen.poll() is not None]:
                    alive.remove(process)
                    # A stopped run ends with its state saved, or before it had a state
                    as_asked = (Interrupted.exit_code, -signal.SIGTERM)
                    if not (stop.name and process.popen.returncode in as_asked):
                        on_end(_outcome(process.run, process.popen.returncode))
        finally:  # no process may be left after a second Ctrl-C or a bug
            for process in alive:
                process.popen.kill()
    return stop.name


def measure_on_test(runs: Sequence[PlannedRun], on_start: Callable[[PlannedRun], None]) -> None:
    """Measure each finished run on the test pairs, if there are any, and write the figures to its
    ``home``. Runs that were measured before are skipped.

    ``on_start`` is called before each measurement. The choice of the best run does not use these
    figures.

    Raises:
        ClipftError: A checkpoint or the pairs cannot be read.
    """
    from clipft.evaluation.compare import evaluate_checkpoint
    from clipft.evaluation.request import Request
    from clipft.runs.checkpoint import load_checkpoint
    from clipft.runs.places import find_checkpoint

    for run in runs:
        settings = run.settings.values
        place = run.home / TEST
        if not run.finished or place.exists() or not tars_in(settings.data_dir / "test"):
            continue
        on_start(run)
        content = load_checkpoint(find_checkpoint(run.folder, settings))
        request = Request(None, [], None, None, "test")
        found = evaluate_checkpoint(content, settings, request, lambda note: None)
        before, after = found.comparison.before, found.comparison.after
        # If no epoch was better, the result of a run is the pretrained model
        better = after and (read_run(run.folder).result or {}).get("after")
        figures = {
            "before": before.retrieval.to_dict(),
            "after": after.retrieval.to_dict() if after and better else None,
        }
        write_json(place, figures)


def environments(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables for each of ``jobs`` processes that run at the same time.

    GPUs are assigned in turn. Without a GPU, each process gets an equal share of the processors,
    unless the user has set it.
    """
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


def _start(run: PlannedRun, environment: dict[str, str], lock: int) -> "subprocess.Popen[bytes]":
    write_text(run.config, run.settings.to_toml())
    train = ["train", "--config", str(run.config), "--resume-from-checkpoint", "--json"]
    # Settings from the environment are already in the file, and would override those of the run
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX) or k in ENV_OTHERS}
    kept.pop("CLIPFT_CONFIG", None)
    with run.log.open("ab") as log, (run.home / _ANSWER).open("wb") as answer:
        return subprocess.Popen(
            [sys.executable, "-m", "clipft", *train],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=log,
            env={**kept, **environment},
            pass_fds=[lock],
            # Only this process may receive Ctrl-C, and passes it on once
            start_new_session=True,
        )


def _outcome(run: PlannedRun, code: int) -> Outcome:
    if code == 0:
        return Outcome(run, 0)
    if code < 0:
        hint = "it may be out of memory: set --micro-batch-size, or fewer --jobs"
        return Outcome(run, 128 - code, f"killed by {signal.Signals(-code).name}", hint)
    try:
        lines = (run.home / _ANSWER).read_text(encoding="utf-8").splitlines()
        answer = dict(json.loads(lines[-1])["error"])
    except (OSError, ValueError, LookupError, TypeError):
        answer = {}  # it crashed before it could answer
    error = answer.get("message")
    if not error:
        log = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        error = " ".join(log[-_LOG_LINES:]) or "it wrote no message"
    return Outcome(run, code, error, answer.get("hint") or f"see {run.log}")


def write_state(folder: Path, runs: Sequence[PlannedRun], ended: Mapping[Path, Outcome]) -> None:
    """Write ``ablation.json``.

    Args:
        folder: the ablation's folder.
        runs: all runs.
        ended: run folder -> its outcome. A run that is neither in it nor finished is waiting.
    """
    entries = []
    for run in runs:
        outcome = ended.get(run.folder)
        failed = outcome if outcome and outcome.exit_code else None
        entries.append(
            {
                "variant": run.variant,
                "scenario": run.settings.values.scenario,
                "varied": run.varied,
                "seed": run.seed,
                "folder": str(run.folder.relative_to(folder.resolve())),
                "state": "finished" if run.finished else "failed" if failed else "waiting",
                "exit_code": failed.exit_code if failed else None,
                "error": failed.error if failed else None,
                "hint": failed.hint if failed else None,
            }
        )
    content = {
        "format_version": 1,
        "settings": beside_defaults(settings_in_common(runs)),
        "runs": entries,
    }
    write_json(folder / STATE, content, indent=1)


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``ablation.json``, and add the results in the folder of each finished run.

    These are ``before`` and ``after`` (retrieval; None if no epoch was better), ``epochs``,
    ``evaluation``, ``plan``, ``environment``, time, memory, and ``test`` (None without test pairs).

    Raises:
        UsageError: ``folder`` holds no ablation.
    """
    state = read_json(folder / STATE)
    if state is None or "runs" not in state:
        raise UsageError(
            f"no ablation in {folder}", "name the folder that `clipft ablate` wrote to"
        )
    for run in state["runs"]:
        if run["state"] != "finished":
            continue
        records = read_run(folder / run["folder"])
        assert records.result
        for name in ("before", "after", "best_epoch", "steps", "stopped_early", "skipped_pairs"):
            run[name] = records.result[name]
        run |= {
            "epochs": records.epochs,
            "evaluation": records.evaluation,
            "plan": records.run.get("plan"),
            "environment": records.run.get("environment", {}),
            "seconds": records.run.get("seconds"),
            "peak_memory_bytes": records.run.get("peak_memory_bytes"),
            "test": read_json((folder / run["folder"]).parent / TEST),
        }
    return state
