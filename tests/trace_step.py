"""Print clipft's own call stack from ``clipft train`` to the first ``backward()``.

``python -m tests.trace_step`` renders a small catalogue, trains on it, and prints each function of
the package between the command and ``backward()``, and the number of functions and files.
"""

import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import torch

import clipft
from clipft.cli.app import run

PACKAGE = Path(clipft.__file__).parent
LAUNCHER = {"run", "main", "<module>"}
"""Functions that start the app, which are on the stack of every command."""


class FirstBackward(BaseException):
    """Ends the run at the first backward pass. No handler of ``Exception`` catches it."""


def own_frames() -> list[tuple[str, str]]:
    """Return (file, function) of the package's frames on the stack, outermost first."""
    frames = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
    own = [(f.relative_to(PACKAGE).as_posix(), n) for f, n in frames if PACKAGE in f.parents]
    return [(f, n) for f, n in own if not (f == "cli/app.py" and n in LAUNCHER)]


def stack_of_a_step() -> list[tuple[str, str]]:
    """Return the frames between ``clipft train`` and ``backward()``, in a run on a small
    catalogue."""
    stack: list[tuple[str, str]] = []

    def record(*args: object, **named: object) -> None:
        stack.extend(own_frames())
        raise FirstBackward

    with tempfile.TemporaryDirectory() as folder:
        run(["demo", "--render-only", "--pairs", "120", "--output-dir", folder])
        torch.autograd.backward = record  # type: ignore[assignment]
        data = ["--data-dir", f"{folder}/data", "--output-dir", f"{folder}/runs"]
        with suppress(FirstBackward):
            run(["train", "--mini-train", "--model", "tiny", *data, "--micro-batch-size", "8"])
    return stack


def main() -> None:
    stack = stack_of_a_step()
    for file, name in stack:
        print(f"  {file:<36}{name}")
    print(f"{len(stack)} functions in {len({file for file, _ in stack})} files")
    sys.exit(not stack)


if __name__ == "__main__":
    main()
