"""Read the code blocks of the documents, and run their commands.

The tests run a block after ``<!-- run -->``, the slow tests one after ``<!-- run slow -->``. The
blocks of a page run one after another in the same folder.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipft.cli.app import run

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
SHELLS = {"sh", "bash", ""}

_BLOCK = re.compile(
    r"^(?:<!-- run(?P<slow> slow)? -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)

_COMMAND = re.compile(r"^(srun .*|torchrun .*|until )?clipft |-m clipft ")

SMALL = {
    "CLIPFT_MODEL": "tiny",
    "CLIPFT_MINI_TRAIN": "true",
    "CLIPFT_NUM_WORKERS": "0",
    "CLIPFT_RESAMPLES": "20",
    "CLIPFT_PRECISION": "fp32",
}
"""Environment in which the commands of the documents take seconds."""

_SMALLER = {"clipft demo": "clipft demo --pairs 160"}


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    runs: bool
    slow: bool

    def lines(self) -> list[str]:
        """Its lines, continued ones joined, without empty lines and comments."""
        joined = [line.strip() for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in joined if line and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        marked = found[0].startswith("<!-- run")
        yield Block(found["kind"], found["text"], marked, bool(found["slow"]))


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each clipft command in a page's shell blocks, without redirections."""
    for block in blocks(page):
        if block.kind not in SHELLS:
            continue
        for line in block.lines():
            if not _COMMAND.search(line):
                continue
            words = shlex.split(line, comments=True)
            words = words[words.index("clipft") + 1 :]
            ends = [i for i, word in enumerate(words) if word in {">", "|", "&&", "do"}]
            yield [word.rstrip(";") for word in words[: ends[0] if ends else None]]


def run_page(page: Path, slow: bool = False) -> int:
    """Run the marked commands of a page in the current folder; return how many there were."""
    count = 0
    for block in blocks(page):
        for line in block.lines() if block.runs and block.slow == slow else ():
            code = _run(line)
            assert code == 0, f"{page.name}: {line!r} ended with {code}"
            count += 1
    return count


def _run(line: str) -> int:
    for command, smaller in _SMALLER.items():
        line = line.replace(command, smaller)
    words = shlex.split(line, comments=True)
    if words[0] == "clipft" and ">" not in words:
        return run(words[1:])
    scripts = Path(sys.executable).parent
    environ = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", line], env=environ).returncode
