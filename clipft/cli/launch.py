"""``--processes N``: this command once more in N processes, under PyTorch's elastic launcher.

The processes tell their errors to the launcher through the file that torch gives each of them
(TORCHELASTIC_ERROR_FILE), and the launcher says the one that was first.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from clipft.core.common import processors
from clipft.core.errors import ClipftError, ProcessError

_RUN_ID = "clipft-"
_SECONDS_TO_SAVE = 300
"""From the signal that asks the processes to end to the one that ends them."""


def told_launcher(error: ClipftError) -> bool:
    """Leave the error to the launcher of this process, if ``--processes`` started it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not _launched():
        return False
    told = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    extra = {"timestamp": str(int(time.time())), "py_callstack": ""}
    body = {"message": {"message": error.message, "extraInfo": extra}, "clipft": told}
    Path(path).write_text(json.dumps(body), encoding="utf-8")
    return True


def _launched() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN_ID)


def follow_launcher() -> None:
    """End (state saved) when the launcher is gone: killed, it can tell nobody."""
    if not _launched():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def starts_others(processes: int) -> bool:
    """Is this the process that starts ``processes``, and none of those that were started?"""
    started = "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    return processes > 1 and not started


def launch(processes: int, args: Sequence[str]) -> None:
    """``clipft ARGS`` in so many processes of this machine, to their end.

    Raises:
        ClipftError: the first error that one of them had, with its exit code.
        ProcessError: one of them was killed.
        typer.Exit: a signal ended them before there was anything to save.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    with tempfile.TemporaryDirectory(prefix="clipft-") as folder:
        try:
            _run(processes, args, folder)
        except ChildFailedError as failed:
            raise _first_error(Path(folder), processes, failed.failures) from failed


def _run(processes: int, args: Sequence[str], folder: str) -> None:
    import psutil
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{_RUN_ID}{uuid.uuid4()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "clipft", *args)
    except SignalException as stopped:
        for child in psutil.Process().children(recursive=True):  # a second signal: at once
            child.kill()
        raise (_told(Path(folder)) or typer.Exit(128 + stopped.sigval)) from stopped


def _told(folder: Path) -> ClipftError | None:
    """The earliest error that a process left for us; one that lost others counts last."""
    bodies = (json.loads(path.read_text("utf-8")) for path in folder.rglob("error.json"))
    told = [body for body in bodies if "clipft" in body]
    every: list[type[ClipftError]] = [ClipftError, *ClipftError.__subclasses__()]
    kinds = {kind.exit_code: kind for kind in every}
    errors = [
        kinds[body["clipft"]["exit_code"]](body["clipft"]["message"], body["clipft"]["hint"])
        for body in sorted(told, key=lambda body: int(body["message"]["extraInfo"]["timestamp"]))
    ]
    errors.sort(key=lambda error: isinstance(error, ProcessError))
    return errors[0] if errors else None


def _first_error(folder: Path, processes: int, failures: dict[int, Any]) -> ClipftError:
    """What a process said, unless it is only that it lost one that was killed."""
    told = _told(folder)
    if told and not isinstance(told, ProcessError):
        return told
    killed = {rank: f.exitcode for rank, f in failures.items() if f.exitcode < 0}
    for rank, code in killed.items():
        return ProcessError(
            f"process {rank} of {processes} was killed by {signal.Signals(-code).name}",
            "if memory is short, use a smaller --micro-batch-size or fewer --processes; "
            "`clipft resume` goes on from the last checkpoint",
        )
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return told or ProcessError(
        f"process {rank} of {processes} ended with exit code {failure.exitcode}",
        "see what it said above",
    )
