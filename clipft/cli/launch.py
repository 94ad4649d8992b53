"""``--processes N``: run the command in N processes, under PyTorch's elastic launcher.

Each process hands its error to the launcher in the file that torch names to it
(TORCHELASTIC_ERROR_FILE). The launcher then reports the error that came first.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from clipft.core.common import processors
from clipft.core.errors import ClipftError, ProcessError
from clipft.training.signals import end_with_parent

_RUN_ID = "clipft-"
_SECONDS_TO_SAVE = 300
"""How long the processes may take to save their state after a signal, before they are killed."""


def launch_processes(processes: int, args: Sequence[str]) -> bool:
    """Run ``clipft ARGS`` in that many processes of this machine, if that is this one's task.

    Returns True when they have ended well. Returns False at once where there is nothing to
    launch: one process is enough, or this is itself one of several, whoever started them.

    Raises:
        ClipftError: the first error that one of them had, with its exit code.
        ProcessError: one of them was killed.
        typer.Exit: a signal ended them before there was anything to save.
    """
    if processes == 1 or one_of_several():
        if _launched():
            end_with_parent()
        return False
    import psutil
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher logs a traceback of its own for each failure, which says less than the error
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    with tempfile.TemporaryDirectory(prefix="clipft-") as folder:
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
            # A second signal leaves the launcher before its processes have ended
            for child in psutil.Process().children(recursive=True):
                child.kill()
            error = _reported_error(Path(folder))
            raise (error or typer.Exit(128 + stopped.sigval)) from stopped
        except ChildFailedError as failed:
            raise _first_error(Path(folder), processes, failed.failures) from failed
    return True


def one_of_several() -> bool:
    """Return True in a process that is one of several of the same run, whoever started them."""
    return bool(os.environ.get("RANK") or os.environ.get("SLURM_STEP_NUM_TASKS"))


def _launched() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN_ID)


def told_launcher(error: ClipftError) -> bool:
    """Hand ``error`` to the launcher of this process; False if ``--processes`` started none."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not _launched():
        return False
    told = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    # torch itself reads "message" from this file; "clipft" is ours
    extra = {"timestamp": str(int(time.time())), "py_callstack": ""}
    body = {"message": {"message": error.message, "extraInfo": extra}, "clipft": told}
    Path(path).write_text(json.dumps(body), encoding="utf-8")
    return True


def _reported_error(folder: Path) -> ClipftError | None:
    """Return the earliest error that a process left in ``folder``.

    Errors of processes that only lost another one come last: they are a consequence.
    """
    bodies = (json.loads(path.read_text("utf-8")) for path in folder.rglob("error.json"))
    told = [body for body in bodies if "clipft" in body]
    told.sort(key=lambda body: int(body["message"]["extraInfo"]["timestamp"]))
    every: list[type[ClipftError]] = [ClipftError, *ClipftError.__subclasses__()]
    kinds = {kind.exit_code: kind for kind in every}
    errors = [
        kinds[body["clipft"]["exit_code"]](body["clipft"]["message"], body["clipft"]["hint"])
        for body in told
    ]
    errors.sort(key=lambda error: isinstance(error, ProcessError))
    return errors[0] if errors else None


def _first_error(folder: Path, processes: int, failures: dict[int, Any]) -> ClipftError:
    """Return what a process reported, or else which one was killed or ended without a word.

    ``failures`` maps ranks to torch's ``ProcessFailure``.
    """
    told = _reported_error(folder)
    if told and not isinstance(told, ProcessError):
        return told
    for rank, failure in failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return ProcessError(
                f"process {rank} of {processes} was killed by {name}",
                "if memory is short, use a smaller --micro-batch-size or fewer --processes; "
                "`clipft resume` continues from the last checkpoint",
            )
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return told or ProcessError(
        f"process {rank} of {processes} ended with exit code {failure.exitcode}",
        "look for its messages above",
    )
