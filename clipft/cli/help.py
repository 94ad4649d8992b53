"""The help as people read it: brackets are brackets, switches have no name of their type."""

from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


class _Helpful:
    help: str | None
    params: list[Any]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.help = escape(self.help or "")
        for param in self.params:  # rich would take [default: none] for markup, and drop it
            param.help = escape(param.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = param.metavar or ""  # typer would write <bool>
        return params


class HelpfulCommand(_Helpful, TyperCommand):
    """A command."""


class HelpfulGroup(_Helpful, TyperGroup):
    """``clipft`` itself."""
