"""The one mouth. Results go to stdout, everything for people on the way to stderr.

With ``--json`` stdout carries one JSON object and nothing else.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

from clipft.core.errors import ClipftError
from clipft.reporting.wrapping import say


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
