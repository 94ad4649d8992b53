"""The one mouth. Results go to stdout, everything for people on the way to stderr.

With ``--json`` stdout carries one JSON object and nothing else.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from clipft.core.errors import ClipftError

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


class _Console(Console):
    """One whose reader may go away (``| head``): nothing more is said, and the work goes on.
    rich's own would end the program there and then, a run without its state saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _silence(self.file.fileno())


_PIPED = 120
"""Columns of a table that goes into a file or a program."""


def _console(**options: Any) -> _Console:
    console = _Console(highlight=False, **options)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED
    return console


class Output:
    """What a command says: notes on the way, and one result at its end."""

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json and not quiet
        self.err = _console(stderr=True, quiet=quiet)
        self._out = self.err if as_json else _console(quiet=quiet)

    def note(self, text: str) -> None:
        """A line for people, on stderr. ``text`` is plain: brackets are not markup."""
        say(self.err, text)

    @contextmanager
    def progress(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work that reports (done, total); one plain line where nothing can move."""
        if not self.err.is_interactive:
            self.note(f"{text} ...")
            yield lambda done, total: None
            return
        from rich.progress import Progress

        with Progress(console=self.err, transient=True) as bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def result(self, data: dict[str, Any], *shown: RenderableType) -> None:
        """The command's result: ``data`` for programs, ``shown`` for people."""
        for renderable in shown:
            if isinstance(renderable, str):
                say(self._out, renderable)
            else:
                self._out.print(renderable)
        if self.as_json:
            print(json.dumps(data, ensure_ascii=False, default=str), flush=True)

    def raw(self, data: dict[str, Any], text: str) -> None:
        """A result whose text is itself read by programs (TOML): never wrapped or coloured."""
        print(json.dumps(data, ensure_ascii=False, default=str) if self.as_json else text, end="")


def silent() -> Output:
    """For all processes of a run but the one that speaks."""
    return Output(as_json=False, quiet=True)


def print_error(error: ClipftError, as_json: bool) -> None:
    """One line ``error:`` and one line ``hint:`` on stderr; with ``--json`` an object too."""
    err = _console(stderr=True)
    for label, text in (("error", error.message), ("hint", error.hint)):
        say(err, f"{label}: {' '.join(text.split())}")
    if as_json:
        body = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print(json.dumps({"error": body}, ensure_ascii=False), flush=True)


def silence_broken_pipe() -> None:
    """The reader of stdout went away (``| head``): say nothing more, not even at exit."""
    _silence(sys.stdout.fileno())


def _silence(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def end(
    out: Output, made: Mapping[str, Path | str | None], following: Sequence[object] = ()
) -> None:
    """``made``: places by what lies there, None: not made; ``following``: the words after
    ``clipft``. Says nothing with ``--json``, whose object has it all."""
    if out.as_json:
        return
    there = {what: place for what, place in made.items() if place is not None}
    broad = max(map(len, there), default=0)
    for label, (what, place) in zip(
        ["Made:", *[" " * 5] * len(there)], there.items(), strict=False
    ):
        out.note(f"{label} {what:{broad}}  {place}")
    if following:
        say_command(out.err, "Next: ", ("clipft", *following))
