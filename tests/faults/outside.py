"""clipft run as a program, driven from outside with real processes, signals and limits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[2]

SMALL = [
    *("--model", "tiny", "--epochs", "3", "--effective-batch-size", "32", "--device", "cpu"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
    *("--stop-on", "never", "--checkpoint-every", "1", "--resume-from-checkpoint"),
]


def command(catalogue: Path, out: Path, *more: str) -> list[str]:
    return ["train", *SMALL, "--data-dir", str(catalogue), "--output-dir", str(out), *more]


@dataclass
class Program:
    """A program that was started."""

    process: warm.Popen
    out_path: Path
    err_path: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """Wait for the exit code; negative if a signal ended the program."""
        try:
            return int(self.process.wait(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"it did not end within {seconds} s: {self.err}") from None

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
    """Starts programs whose output goes to files in ``folder``, and kills those that are left."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, list[Program]()

    def start(
        self,
        *args: str,
        env: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        limits: dict[str, int] | None = None,
        umask: int = -1,
    ) -> Program:
        """Start ``clipft ARGS``. A value of None in ``env`` removes the variable."""
        count = len(self._started)
        out, err = (self._folder / f"{count}.{name}" for name in ("out", "err"))
        environ = {**os.environ, **(env or {})}
        with out.open("w") as writes, err.open("w") as errs:
            process = warm.Popen(
                [sys.executable, "-m", "clipft", *args],
                env={name: value for name, value in environ.items() if value is not None},
                cwd=cwd or self._folder,
                stdin=subprocess.DEVNULL,
                stdout=writes,
                stderr=errs,
                limits=limits,
                umask=umask,
            )
        self._started.append(Program(process, out, err))
        return self._started[-1]

    def run(self, *args: str, **more) -> Program:
        """Start a program and wait for its end."""
        program = self.start(*args, **more)
        program.wait()
        return program

    def close(self) -> None:
        for program in self._started:
            program.signal(signal.SIGKILL)
            program.wait()


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
