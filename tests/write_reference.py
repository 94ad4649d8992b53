"""The reference of commands and of settings, made of what the program says itself.

Run ``python -m tests.write_reference`` after a change of an option, a help or a setting.
"""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from clipft.cli.app import COMMANDS, command_of
from clipft.config.fields import fate_of, fields_of
from clipft.config.settings import SECTIONS
from clipft.config.text import choices_of, default_text, kind_of, range_of

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
_SEE = "[settings](settings.md)"


def commands_page() -> str:
    """Every command: what it says of itself, its arguments, its own options, its settings."""
    lines = [
        "# Commands",
        "",
        "Every command takes `--config FILE` (TOML with settings), `--json` (one JSON",
        "object on stdout) and `--debug` (the traceback of an error); see",
        f"[exit codes](../exit-codes.md). Options that are settings are explained in {_SEE}.",
    ]
    for name in COMMANDS:
        lines += ["", *_command(command_of(name))]
    return "\n".join(lines) + "\n"


def _command(command: Any) -> Iterator[str]:
    name = command.__name__.replace("_", "-")
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("Examples:")
    yield f"## clipft {name}"
    yield ""
    yield text.strip()
    yield ""
    yield "```"
    yield from (line.strip() for line in examples.strip().splitlines())
    yield "```"
    parameters = inspect.signature(command.function).parameters
    rows = [_described(p) for p in parameters.values() if not _is_shared(p)]
    if rows:
        yield ""
        yield "| argument or option | meaning | default |"
        yield "| --- | --- | --- |"
        yield from rows
    listed = list(_settings(parameters))
    if listed:
        yield ""
        yield f"Settings: {', '.join(listed)}."


def _settings(parameters: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Whole sections by their titles, of others the settings by name."""
    for section in SECTIONS:
        names = [name for name, _ in fields_of(section)]
        there = [n for n in names if n in parameters and _panel(parameters[n]) == section.title]
        if there == names:
            yield f"all of [{section.title}](settings.md#{section.title.lower()})"
        else:
            yield from (f"`--{name.replace('_', '-')}`" for name in there)


def _is_shared(parameter: inspect.Parameter) -> bool:
    """Of settings, of every command, or not for users."""
    shown = _shown(parameter)
    titles = {section.title for section in SECTIONS} | {"Common"}
    return shown is None or getattr(shown, "hidden", False) or _panel(parameter) in titles


def _shown(parameter: inspect.Parameter) -> Any:
    """What typer is told of it."""
    return next(iter(get_args(parameter.annotation)[1:]), None)


def _panel(parameter: inspect.Parameter) -> str | None:
    return getattr(_shown(parameter), "rich_help_panel", None)


def _described(parameter: inspect.Parameter) -> str:
    shown = _shown(parameter)
    # In an annotation typer keeps the first name in the place of a default
    declared = (shown.default, *(shown.param_decls or ()))
    names = [d for d in declared if isinstance(d, str) and d.startswith("--")]
    words = " ".join(filter(None, [*names, shown.metavar or ("" if names else parameter.name)]))
    default, about = parameter.default, str(shown.help)
    about, _, said = about.partition("[default: ")
    if said:
        value = said.rstrip("]")
    elif default is inspect.Parameter.empty:
        value = "required"
    else:
        value = default_text(default) if default != "" else "none"
    return f"| `{_cell(words)}` | {_cell(about.strip())} | {_cell(value)} |"


def settings_page() -> str:
    """Every setting: kind, range, default, whether a resumed run may change it."""
    lines = [
        "# Settings",
        "",
        "A setting is `lr` in a TOML file, `--lr` on the command line and `CLIPFT_LR` in the",
        "environment. How they rank, and more of some: [settings](../settings.md). A settings file",
        "to begin with: `clipft settings --template`; its JSON schema: `clipft settings --schema`.",
        "",
        "*Fixed* settings decide the weights: a resumed run keeps them as they were.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", "| name | meaning | value | default | |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name, field in fields_of(section):
            value = ", ".join(f"`{c}`" for c in choices_of(name)) or kind_of(name)
            numbers = range_of(field)
            value += f", {numbers}" if numbers else ""
            fixed = "fixed" if fate_of(field) == "fixed" else ""
            default = f"`{default_text(field.default)}`"
            cells = (f"`{name}`", str(field.description), value, default, fixed)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"commands.md": commands_page, "settings.md": settings_page}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
