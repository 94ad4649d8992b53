"""Runs many command lines from a process that has imported nothing but the app, in seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PROGRAM = """
import importlib, json, os, sys, tempfile

lines, wanted, modules = json.load(sys.stdin)
for module in ("clipft.cli.app", *modules):
    importlib.import_module(module)
for args in lines:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = said
            code = sys.modules["clipft.cli.app"].run(args)
            said.seek(0)
            ended = code, [name for name in wanted if name in sys.modules], said.read()
            said.seek(0)
            said.truncate()
            json.dump(ended, said)
            said.flush()
            os._exit(0)
        os.waitpid(child, 0)
        said.seek(0)
        print(said.read())
"""


class Ended(NamedTuple):
    """How a command ended. ``imported`` are those modules of ``wanted`` that it had imported."""

    code: int
    imported: list[str]
    output: str


def in_forks(
    lines: Sequence[Sequence[str]], wanted: Sequence[str], folder: Path, *modules: str
) -> list[Ended]:
    """Run each command line in a fork of one process, in ``folder``.

    Args:
        lines: the arguments of clipft.
        wanted: modules to look for when a command has ended.
        folder: the working folder.
        modules: what the process imports besides ``clipft.cli.app`` before it forks.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([lines, wanted, modules]),
        env={**os.environ, "CLIPFT_CACHE": str(folder / "cache"), "COLUMNS": "100"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Ended(*json.loads(line)) for line in done.stdout.splitlines()]
