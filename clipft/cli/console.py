"""All that a command prints: results to stdout, everything else to stderr.

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

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from clipft.core.common import shell_command
from clipft.core.errors import ClipftError
from clipft.core.text import visible

_UNBREAKABLE = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")
"""A word, or a whole command in backticks with the punctuation attached to it."""
_LINE_BREAK = re.compile(r"\s*[\r\n]\s*")
_LABEL = re.compile(r"(?:error|hint|warning|note|Made|Next):")
_STYLES = {"error:": "bold red", "warning:": "bold yellow"}
_PIPED_WIDTH = 120
"""Columns of a table that is written to a file or read by another program."""


def say(console: Console, text: str, fit: bool = False) -> None:
    """Print ``text``, its label (``note:``, ``error:``) highlighted.

    Long lines are wrapped on a terminal only; files and pipes get them whole, unless ``fit`` is
    set and COLUMNS says how wide they are. Brackets in the text are printed as they are, not read
    as rich markup.
    """
    lines = text.splitlines() or [""]
    if console.is_terminal or (fit and "COLUMNS" in os.environ):
        lines = [part for line in lines for part in wrapped(line, console.width)]
    shown = Text("\n".join(lines))
    label = _LABEL.match(text)
    if label:
        shown.stylize(_STYLES.get(label.group(), "bold"), 0, label.end())
    # soft_wrap: rich would break within commands, and also where nothing is a terminal
    console.print(shown, soft_wrap=True)


def wrapped(line: str, width: int) -> list[str]:
    """Break ``line`` between words into parts of at most ``width`` columns.

    Commands in backticks stay in one piece even if that makes a part longer. All parts but
    the first are indented by two more columns than the line itself.
    """
    if len(line) <= width:
        return [line]
    first, *others = _UNBREAKABLE.findall(line)
    margin = line[: len(line) - len(line.lstrip())]
    return _fill([margin + first, *others], width, indent=margin + "  ")


def say_command(console: Console, lead: str, words: Sequence[object]) -> None:
    r"""Print ``clipft WORDS`` for the user to copy, after ``lead``.

    On a terminal that is too narrow for it, the command is broken before options, each line
    ending in ``\`` so that a shell reads the copied lines as one command.
    """
    command = shell_command(*words)
    lines, given = [lead + command], shlex.split(command)
    if console.is_terminal and len(lines[0]) > console.width:
        groups = [[given[0]]]  # an option stays on one line with its value
        for word in given[1:]:
            takes_value = groups[-1][0].startswith("-") and len(groups[-1]) == 1
            if takes_value and not word.startswith("-"):
                groups[-1].append(word)
            else:
                groups.append([word])
        chunks = [shlex.join(group) for group in groups]
        chunks[0] = lead + chunks[0]
        *broken, last = _fill(chunks, console.width - len(" \\"), indent="    ")
        lines = [*(f"{line} \\" for line in broken), last]
    shown = Text("\n".join(lines))
    shown.stylize("bold", 0, len(lead.rstrip()))
    console.print(shown, soft_wrap=True)


def _fill(chunks: Iterable[str], width: int, indent: str) -> list[str]:
    """Join ``chunks`` by spaces into lines of at most ``width`` where they fit."""
    lines, line = [], ""
    for chunk in chunks:
        longer = f"{line} {chunk}" if line.strip() else line + chunk
        if len(longer) > width and line.strip():
            lines.append(line)
            longer = indent + chunk
        line = longer
    return [*lines, line]


class _Console(Console):
    """A console for the words of others, which survives a reader who goes away.

    Names and captions are shown as they are: brackets and colons are not markup, and control
    characters become visible, so that no caption can move the cursor or change a color.

    When the reader goes away, as with ``clipft train | head``, rich's own console would exit at
    once, and a training run would lose its state. This one falls silent, and the work goes on.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _PIPED_WIDTH

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Render as rich does; everything that this console prints passes through here."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible(segment.text)
            yield Segment(text, segment.style, segment.control)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence_broken_pipe(self.file.fileno())


def silence_broken_pipe(descriptor: int) -> None:
    """Redirect a stream whose reader is gone to /dev/null.

    Otherwise Python would report the broken pipe once more when it flushes at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Output:
    """What a command prints: notes and progress while it works, then one result.

    ``quiet`` is for the processes of a distributed run that must not print at all.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json and not quiet
        self.err = _Console(stderr=True, quiet=quiet)
        self._out = self.err if as_json else _Console(quiet=quiet)

    def note(self, text: str) -> None:
        """Print a line to stderr. Brackets in it are not read as markup."""
        say(self.err, text)

    @contextmanager
    def progress(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar under the heading ``text``; call what this yields with (done, total).

        Where the cursor cannot move, one plain line is printed instead.
        """
        if not self.err.is_interactive:
            self.note(f"{text} ...")
            yield lambda done, total: None
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        title = TextColumn("{task.description}", markup=False)  # it may name the user's folder
        columns = (title, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def result(self, data: dict[str, Any], *shown: RenderableType) -> None:
        """Print the command's result: ``shown`` for people and, with ``--json``, ``data``."""
        for renderable in shown:
            if isinstance(renderable, str):
                say(self._out, renderable, fit=True)
            else:
                self._out.print(renderable)
        if self.as_json:
            print(_json(data), flush=True)

    def raw(self, data: dict[str, Any], text: str) -> None:
        """Print a result that is itself a file format, such as TOML, without any wrapping."""
        print(_json(data) if self.as_json else text, end="")


def print_error(error: ClipftError, as_json: bool) -> None:
    """Print an ``error:`` and a ``hint:`` line to stderr; with ``--json`` an object to stdout."""
    err = _Console(stderr=True)
    for label, text in (("error", error.message), ("hint", error.hint)):
        # One line, but the spaces within a path stay as they are
        say(err, f"{label}: {_LINE_BREAK.sub(' ', text.strip())}")
    if as_json:
        body = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print(_json({"error": body}), flush=True)


def _json(data: dict[str, Any]) -> str:
    """Format a result; what a terminal would obey is escaped, as JSON allows."""
    unicode = "utf" in (sys.stdout.encoding or "utf-8").lower()
    text = json.dumps(data, ensure_ascii=not unicode, default=str)
    shown = visible(text)
    if shown == text:
        return text
    pairs = zip(text, shown, strict=True)
    return "".join(old if old == new else f"\\u{ord(old):04x}" for old, new in pairs)


def end(
    out: Output, made: Mapping[str, Path | str | None], following: Sequence[object] = ()
) -> None:
    """Print a command's last lines: the files it made, and the command to type next.

    ``made`` maps a description to a path, None for what was not made after all. ``following``
    holds the words after ``clipft``. With ``--json`` nothing is printed: the object has it all.
    """
    if out.as_json:
        return
    places = {what: place for what, place in made.items() if place is not None}
    width = max(map(len, places), default=0)
    label = "Made:"
    for what, place in places.items():
        out.note(f"{label} {what:{width}}  {place}")
        label = " " * len(label)
    # A terminal cannot take control characters or bytes that are not UTF-8, so it cannot be typed
    if following and all(str(word).isprintable() for word in following):
        say_command(out.err, "Next: ", following)
