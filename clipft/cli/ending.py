"""The last lines of a command for people: what was made, where, and the next useful command."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipft.cli.console import Output
from clipft.reporting.wrapping import say_command


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
