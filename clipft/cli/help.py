"""The help as people read it: switches without the name of their type."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Helpful:
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
