"""clipft run as a program, driven from outside with real processes, signals and limits.

``Programs`` starts one process that has all heavy packages loaded and forks it for each call, so
that a run costs what it costs beyond its imports; everything else is as ``python -m clipft``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]

SMALL = [
    *("--model", "tiny", "--epochs", "3", "--effective-batch-size", "32", "--device", "cpu"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "1", "--resume-from-checkpoint"),
]


def command(catalogue: Path, out: Path, *more: str) -> list[str]:
    return ["train", *SMALL, "--data-dir", str(catalogue), "--output-dir", str(out), *more]


SERVER = """
import json, os, resource, signal, sys
import torch, transformers, peft
import clipft.cli.running, clipft.training.run, clipft.runs.folder
import clipft.report.run_page, clipft.export.export, clipft.report.report
from clipft.cli.app import run

def child(asked):
    os.setsid()
    os.environ.clear(); os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for name, size in asked["limits"].items():
        number = getattr(resource, "RLIMIT_" + name)
        resource.setrlimit(number, (size, resource.getrlimit(number)[1]))
    if asked["umask"] is not None:
        os.umask(asked["umask"])
    for path, number in ((os.devnull, 0), (asked["out"], 1), (asked["err"], 2)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    sys.argv = ["clipft", *asked["args"]]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return run(asked["args"])

for line in sys.stdin:
    asked = json.loads(line)
    if "end" in asked:
        break
    if "wait" in asked:
        _, status = os.waitpid(asked["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if not pid:
        try:
            code = child(asked)
        except SystemExit as end:
            code = end.code
        # As a program ends: atexit, threads, the flush of its files
        sys.exit(code)
    print(pid, flush=True)
os._exit(0)
"""


@dataclass
class Program:
    """A program that was started."""

    pid: int
    out_path: Path
    err_path: Path
    _wait: Callable[[int], int]
    _code: int | None = field(default=None)

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    @property
    def running(self) -> bool:
        """True until the program ends or was waited for."""
        stat = Path(f"/proc/{self.pid}/stat")
        try:
            return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
        except FileNotFoundError:
            return False

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Wait for the exit code; negative if a signal ended the program."""
        end = time.monotonic() + seconds
        while self._code is None and self.running:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                self._code = self._wait(self.pid)
                raise AssertionError(f"it did not end within {seconds} s: {self.err}")
            time.sleep(0.002)
        if self._code is None:
            self._code = self._wait(self.pid)
        return self._code

    def error(self) -> tuple[str, str]:
        """The texts after ``error: `` and ``hint: ``, each of which must occur once."""
        self.wait()
        lines = self.err.strip().splitlines()
        assert "Traceback" not in self.err, self.err
        said = [
            [line.removeprefix(mark) for line in lines if line.startswith(mark)]
            for mark in ("error: ", "hint: ")
        ]
        assert len(said[0]) == len(said[1]) == 1, self.err
        return said[0][0], said[1][0]


class Programs:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(
        self,
        *args: str,
        env: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        limits: dict[str, int] | None = None,
        umask: int | None = None,
    ) -> Program:
        """Start ``clipft ARGS``. A value of None in ``env`` removes the variable."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        environ = {**os.environ, **(env or {})}
        asked = {
            "args": args,
            "env": {name: value for name, value in environ.items() if value is not None},
            "cwd": str(cwd or self._folder),
            "limits": limits or {},
            "umask": umask,
            "out": str(out),
            "err": str(err),
        }
        return Program(int(self._ask(asked)), out, err, lambda pid: int(self._ask({"wait": pid})))

    def run(self, *args: str, **more) -> Program:
        """Start a program and wait for its end."""
        program = self.start(*args, **more)
        program.wait()
        return program

    def close(self) -> None:
        # Told so: processes that tests have forked may hold the pipe open
        pipe = _pipe(self._server.stdin)
        pipe.write(json.dumps({"end": True}) + "\n")
        pipe.close()
        self._server.wait(60)

    def _ask(self, asked: dict[str, object]) -> str:
        pipe = _pipe(self._server.stdin)
        pipe.write(json.dumps(asked) + "\n")
        pipe.flush()
        return _pipe(self._server.stdout).readline()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe
    return pipe


def wait_until(true: Callable[[], bool], program: Program, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert program.running, f"it ended with {program.wait()}: {program.err}"
        assert time.monotonic() < end, program.err
        time.sleep(0.002)


def steps(out: Path, scenario: str = "dual_lora") -> int:
    """How many steps the metrics file has so far."""
    path = out / scenario / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0
