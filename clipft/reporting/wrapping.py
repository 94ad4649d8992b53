"""Lines for people: broken between words at the terminal's width, and nowhere else.

What can be typed is never broken by a line end of ours: a command that is copied works.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

_CHUNK = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")
"""A word, or a command in backticks with what is written to it."""
_LABEL = re.compile(r"(?:error|hint|warning|note|Made|Next):")
_STYLES = {"error:": "bold red", "warning:": "bold yellow"}


def say(console: Console, text: str) -> None:
    """One line, its label (``note:``, ``error:``) marked; wrapped on a terminal alone. ``text``
    is plain: brackets are not markup."""
    lines = text.splitlines() or [""]
    if console.is_terminal:
        lines = [part for line in lines for part in wrapped(line, console.width)]
    shown = Text("\n".join(lines))
    label = _LABEL.match(text)
    if label:
        shown.stylize(_STYLES.get(label.group(), "bold"), 0, label.end())
    console.print(shown, soft_wrap=True)


def wrapped(line: str, width: int) -> list[str]:
    """``line`` in parts of at most ``width`` where its words allow it; what follows is indented."""
    if len(line) <= width:
        return [line]
    first, *others = _CHUNK.findall(line)
    lead = line[: len(line) - len(line.lstrip())]
    return list(_filled([lead + first, *others], width, indent=lead + "  "))


def say_command(console: Console, lead: str, words: Sequence[object]) -> None:
    """A command to be copied, after ``lead``; a terminal too narrow for it gets it in lines that
    a shell takes as one."""
    lines = [lead + shlex.join(map(str, words))]
    if console.is_terminal and len(lines[0]) > console.width:
        lines = _continued(lead, words, console.width)
    shown = Text("\n".join(lines))
    shown.stylize("bold", 0, len(lead.rstrip()))
    console.print(shown, soft_wrap=True)


def _continued(lead: str, words: Sequence[object], width: int) -> list[str]:
    chunks = [lead + shlex.quote(str(words[0])), *_options(words[1:])]
    lines = list(_filled(chunks, width - len(" \\"), indent="    "))
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _options(words: Sequence[object]) -> Iterator[str]:
    """Each option together with its value."""
    held: list[str] = []
    for word in map(str, words):
        if held and (word.startswith("-") or not held[0].startswith("-") or len(held) > 1):
            yield shlex.join(held)
            held = []
        held.append(word)
    if held:
        yield shlex.join(held)


def _filled(chunks: Iterable[str], width: int, indent: str) -> Iterator[str]:
    line = ""
    for chunk in chunks:
        longer = f"{line} {chunk}" if line.strip() else line + chunk
        if len(longer) > width and line.strip():
            yield line
            longer = indent + chunk
        line = longer
    yield line
