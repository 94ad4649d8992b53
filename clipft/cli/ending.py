"""The last lines of a command for people: what was made, where, and the next useful command."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipft.cli.console import Output


def end(
    out: Output, made: Mapping[str, Path | str | None], following: Sequence[object] = ()
) -> None:
    """``made``: places by what lies there, None: not made; ``following``: the words after
    ``clipft``. Says nothing with ``--json``, whose object has it all."""
    if out.as_json:
        return
    lines = [f"{what} {place}" for what, place in made.items() if place is not None]
    for label, line in zip(["Made:", *[" " * 5] * len(lines)], lines, strict=False):
        out.note(f"{label} {line}")
    if following:
        out.note(f"Next: {shlex.join(['clipft', *map(str, following)])}")
