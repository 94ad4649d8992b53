"""Read the code blocks of the documents, and run their commands.

The tests run blocks that follow ``<!-- run -->``, and the slow tests blocks that follow
``<!-- run slow -->``. The blocks of a page run one after another in the same folder.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipft.cli.app import run

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
SHELLS = {"sh", "bash", ""}

_BLOCK = re.compile(
    r"^(?:<!-- run(?P<slow> slow)? -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)

_COMMAND = re.compile(r"^(srun .*|until |exec )?clipft |-m clipft ")
_VARIABLE = re.compile(r"\$\w+")

SMALL = {
    "CLIPFT_MODEL": "tiny",
    "CLIPFT_MINI_TRAIN": "true",
    "CLIPFT_NUM_WORKERS": "0",
    "CLIPFT_RESAMPLES": "20",
    "CLIPFT_PRECISION": "fp32",
}
"""Environment variables with which the commands of the documents take only seconds."""

_SMALLER = {"clipft demo": "clipft demo --pairs 160"}


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    runs: bool
    slow: bool

    def lines(self) -> list[str]:
        """Return the lines without empty lines and comments; continued lines are joined."""
        joined = [line.strip() for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in joined if line and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        marked = found[0].startswith("<!-- run")
        yield Block(found["kind"], found["text"], marked, bool(found["slow"]))


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each clipft command in a page's blocks, without redirections.

    A variable such as ``$SM_NUM_GPUS`` becomes a number.
    """
    for block in blocks(page):
        for line in shell_lines(block):
            if not _COMMAND.search(line):
                continue
            words = shlex.split(_VARIABLE.sub("8", line), comments=True)
            words = words[words.index("clipft") + 1 :]
            ends = [i for i, word in enumerate(words) if word in {">", "|", "&&", "do"}]
            yield [word.rstrip(";") for word in words[: ends[0] if ends else None]]


def shell_lines(block: Block) -> list[str]:
    """Return the lines of a block that a shell runs, also from a manifest or a Python program."""
    if block.kind in SHELLS:
        return block.lines()
    if block.kind == "yaml":
        found = [script for part in yaml.safe_load_all(block.text) for script in _scripts(part)]
    elif block.kind == "python":
        values = [node.value for node in ast.walk(ast.parse(block.text)) if _is_text(node)]
        found = [" ".join(value.split()) for value in values if "clipft train" in value]
    else:
        found = []
    return [line for text in found for line in Block("sh", text, False, False).lines()]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _scripts(part: Any) -> Iterator[str]:
    """Yield the scripts of a SkyPilot task (setup, run) or a Kubernetes container (args)."""
    if isinstance(part, dict):
        yield from (part[name] for name in ("setup", "run") if name in part)
        if "args" in part:
            yield shlex.join(part["args"])
        for value in part.values():
            yield from _scripts(value)
    elif isinstance(part, list):
        for value in part:
            yield from _scripts(value)


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
