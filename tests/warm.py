"""Starts Python programs warm: forked from a server that has already imported torch and clipft.

A cold start takes several seconds for imports, which is most of the time of a test with a process.
``warm.Popen`` and ``warm.run`` take the same arguments as in ``subprocess``, for
``[sys.executable, "-m", MODULE, ...]`` and ``[sys.executable, "-c", CODE, ...]``. The process has
its own session, environment, working folder, files, limits and signals. Processes that clipft
starts from it are warm as well.

Use a cold start for anything that is decided by an import: whether a package is installed,
``PYTHONPATH``, ``PYTHONHASHSEED``, ``LD_PRELOAD``, the hub's address. ``/proc`` shows the command
and environment of the server.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_PR_SET_NAME = 15
_MOST_FILES = 8


class _Link:
    """One end of a pair of sockets that carries requests and open files."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self._lock = end, threading.Lock()

    def send(self, request: dict[str, Any], files: Sequence[int]) -> None:
        body = json.dumps(request).encode()
        with self._lock:
            socket.send_fds(self.socket, [len(body).to_bytes(8, "big")], files)
            self.socket.sendall(body)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next request and its files, or None when the other end is closed."""
        head, files, _, _ = socket.recv_fds(self.socket, 8, _MOST_FILES)
        if not head:
            return None
        body = b""
        while len(body) < int.from_bytes(head, "big"):
            body += self.socket.recv(1 << 20)
        return json.loads(body), files


class _Server(_Link):
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,  # it does not receive the Ctrl-C of the tests
            )
        super().__init__(ours)
        atexit.register(self._end)

    def _end(self) -> None:
        self.socket.close()
        self._process.wait(60)


_server = functools.cache(_Server)


def _requested(
    args: Sequence[str], cwd: Any, env: Any, umask: int, limits: dict[str, int]
) -> dict[str, Any]:
    return {
        "args": [os.fspath(arg) for arg in args],
        "cwd": os.fspath(cwd or os.getcwd()),
        "env": dict(os.environ if env is None else env),
        "umask": umask,
        "limits": limits,
    }


def _standard_files(reads: int, writes: int, errs: int) -> list[int]:
    """Return the three files. A file of -1 is replaced by that of this process."""
    return [own if given == -1 else given for own, given in enumerate((reads, writes, errs))]


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` of a warm process. ``limits`` maps names such as FSIZE to soft limits.

    The process is a child of a keeper process, which reports its end here. Until ``wait`` has
    returned here, the keeper leaves it as a zombie, so that its process id is not used again.
    """

    def __init__(self, *args: Any, limits: dict[str, int] | None = None, **more: Any) -> None:
        self._limits = limits or {}
        super().__init__(*args, **more)

    def _execute_child(self, args: Any, *more: Any) -> None:
        _, _, _, pass_fds, cwd, env, _, _, shell, *rest = more
        pipes, umask = rest[:6], rest[10]
        assert args[0] == sys.executable and not pass_fds and not shell, "start this one cold"
        reads, _, _, writes, _, errs = pipes
        self._keeper, theirs = socket.socketpair()
        with theirs:
            files = [*_standard_files(reads, writes, errs), theirs.fileno()]
            _server().send(_requested(args, cwd, env, umask, self._limits), files)
        self.pid = self._told()
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _told(self) -> int:
        told = self._keeper.recv(8, socket.MSG_WAITALL)
        assert told, "the server of warm processes has ended"
        return int.from_bytes(told, "big")

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not select.select([self._keeper], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        status = self._told()
        self._keeper.shutdown(socket.SHUT_WR)
        self._keeper.recv(1)  # returns when the keeper has reaped the zombie
        self._keeper.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(
    args: Sequence[str],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **more: Any,
) -> "subprocess.CompletedProcess[Any]":
    """``subprocess.run`` of a warm process."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


# The code below runs in the server and in the processes that it forks.


def _serve(link: _Link) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while asked := link.receive():
        request, files = asked
        if not os.fork():
            *stdio, keeper = files
            _keep(request, stdio, socket.socket(fileno=keeper))
        for file in files:
            os.close(file)
    os._exit(0)


def _keep(request: dict[str, Any], stdio: list[int], tests: socket.socket) -> NoReturn:
    """Fork the requested process, which sends its process id to the tests; send its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.setsid()
        tests.sendall(os.getpid().to_bytes(8, "big"))
        _become(request, stdio)
    try:
        _close_files(kept=tests.fileno())
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended
        shift = 8 if ended.si_code == os.CLD_EXITED else 0
        tests.sendall((ended.si_status << shift).to_bytes(8, "big"))
        tests.recv(1)
        os.waitpid(pid, 0)
    finally:
        os._exit(0)


def _close_files(kept: int = -1) -> None:
    numbers = {int(name) for name in os.listdir("/proc/self/fd")}
    for number in numbers - {0, 1, 2, kept}:
        with contextlib.suppress(OSError):  # the file of the listing is already closed
            os.close(number)


def _become(request: dict[str, Any], stdio: list[int]) -> NoReturn:
    """Turn this process into the requested one, and run its program."""
    for number, file in enumerate(stdio):
        os.dup2(file, number)
    _close_files()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["umask"] >= 0:
        os.umask(request["umask"])
    for name, size in request["limits"].items():
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (size, resource.getrlimit(number)[1]))
    _name_after_rank()
    args = list(request["args"][1:])
    if unbuffered := args[0] == "-u":
        del args[0]
    _open_streams(unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")))
    _keep_spares(args)
    _run(args)


def _open_streams(unbuffered: bool) -> None:
    """Reopen the standard streams, which still belong to the files of the server."""
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    told = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = told
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=unbuffered)


def _run(args: list[str]) -> NoReturn:
    """Run ``-m MODULE ...`` or ``-c CODE ...``, and exit as Python would."""
    how, program, *rest = args
    sys.argv = [how, *rest]
    code: Any = None
    try:
        if how == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            assert how == "-c", "start this one cold"
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(main))
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    _exit(code or 0)


def _exit(code: int) -> NoReturn:
    """Exit without the cleanup of thousands of modules, which would take two seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    os._exit(code)


def _name_after_rank() -> None:
    """Name the process ``rank-0``, ``rank-1`` etc., for ``ps`` and the tests."""
    if rank := os.environ.get("RANK"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank-{rank}".encode())


_spares: list[tuple[int, _Link]] = []
"""Forked children of this process, which become the programs that it starts. They are forked before
this process has threads, because a fork with threads is not safe."""


def _keep_spares(args: list[str]) -> None:
    """Fork as many children as the command ``args`` will start."""
    count = 0
    for option in ("--processes", "--nproc-per-node"):
        if option in args and "RANK" not in os.environ:
            count = int(args[args.index(option) + 1])
    if args[:3] == ["-m", "clipft", "ablate"]:
        count = 4
    for _ in range(count if count > 1 else 0):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            _wait_as_spare(_Link(theirs))
        theirs.close()
        _spares.append((pid, _Link(ours)))
    if _spares:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess.Popen = subprocess_handler.Popen = _FromSpare  # type: ignore[misc]


def _wait_as_spare(link: _Link) -> NoReturn:
    os.setsid()
    _close_files(kept=link.socket.fileno())
    _spares.clear()
    if asked := link.receive():
        _become(*asked)
    os._exit(0)  # the parent process has ended without using it


class _FromSpare(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that uses a spare child for a Python program if there is one."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        if args[0] != sys.executable or not _spares:
            return super()._execute_child(args, *more)
        _, _, _, _, cwd, env, _, _, _, *rest = more
        reads, _, _, writes, _, errs = pipes = rest[:6]
        self.pid, link = _spares.pop(0)
        link.send(_requested(args, cwd, env, -1, {}), _standard_files(reads, writes, errs))
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _import_what_takes_long() -> None:
    import peft  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import torch.distributed.launcher.api
    import transformers
    import webdataset  # noqa: F401

    import clipft.cli.running
    import clipft.export.export
    import clipft.report.report
    import clipft.report.run_page
    import clipft.runs.folder
    import clipft.training.run  # noqa: F401

    torch.set_num_threads(1)
    transformers.CLIPModel, transformers.CLIPTokenizerFast  # noqa: B018  # imported at their use


if __name__ == "__main__":
    _import_what_takes_long()
    gc.freeze()  # otherwise garbage collection would copy memory in each process
    _serve(_Link(socket.socket(fileno=int(sys.argv[1]))))
