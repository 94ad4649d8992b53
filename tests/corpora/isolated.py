"""Runs a function over many files in other processes, so that a crash or a hang is a result."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CHUNK = 64


class Outcome(NamedTuple):
    """What became of a file: a word, and what is to be said about it."""

    path: Path
    word: str
    remark: str = ""


def outcomes(function: str, paths: Sequence[Path], seconds: float) -> Iterator[Outcome]:
    """Call ``function`` ("module:name"), which returns (word, remark), with every path.

    A process has ``seconds`` for the files of a chunk. If it ends early, prints to stderr or takes
    longer, the file that it was at is reported, and the others go on in a new one.
    """
    left = list(paths)
    while left:
        chunk = left[:CHUNK]
        command = [sys.executable, "-m", "tests.corpora.isolated", function]
        given = json.dumps([str(path.resolve()) for path in chunk])
        why = "crashed"
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, timeout=seconds, cwd=ROOT
            )
            said, errors = done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            said, errors = ((text or b"").decode() for text in (error.stdout, error.stderr))
            why = f"took more than {seconds:g} s"
        found = [json.loads(line) for line in said.splitlines()]
        for path, (word, remark) in zip(chunk, found, strict=False):
            yield Outcome(path, word, remark)
        if len(found) < len(chunk):
            yield Outcome(chunk[len(found)], why, errors.strip()[-200:])
        elif errors.strip():
            yield Outcome(chunk[0].parent, "printed to stderr", errors.strip()[-200:])
        left = left[min(len(found) + 1, len(chunk)) :]


def show(found: Sequence[Outcome]) -> None:
    """Print how often there was which outcome, and each that should not be."""
    counts = Counter((word, remark.partition(" (")[0]) for _, word, remark in found)
    for (word, remark), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"{count:6,}  {word:18} {remark[:90]}")
    print(f"{len(found):6,}  in all")


def serve() -> None:
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    for path in json.load(sys.stdin):
        print(json.dumps(function(Path(path))), flush=True)


if __name__ == "__main__":
    serve()
