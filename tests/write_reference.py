"""Write the reference of commands and settings from what the program says about itself.

Run ``python -m tests.write_reference`` after a change of an option, a help text or a setting.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from clipft.cli.app import COMMANDS, command_of
from clipft.config.fields import choices_of, default_text, kind_of, range_of
from clipft.config.settings import SECTIONS, fixed_on_resume
from clipft.config.sources import option_of

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
_SETTINGS = re.compile(r"<!-- settings -->\n.*?<!-- end settings -->", re.DOTALL)


def commands_page() -> str:
    """Describe every command: its help, its arguments, its own options, and its settings."""
    lines = [
        "# Commands",
        "",
        "Every command accepts `--config FILE` (a TOML file with settings), `--json` (print one",
        "JSON object to stdout) and `--debug` (show the traceback of an error). See also the",
        "[exit codes](output.md#exit-codes). Options that are settings are described on the page",
        "[Settings](settings.md).",
    ]
    for name in COMMANDS:
        lines += ["", *_command(command_of(name))]
    return "\n".join(lines) + "\n"


def _command(command: Any) -> Iterator[str]:
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("Examples:")
    yield f"## clipft {command.__name__.replace('_', '-')}"
    yield ""
    yield text.strip()
    yield ""
    yield "```"
    yield from (line.strip() for line in examples.strip().splitlines())
    yield "```"
    parameters = inspect.signature(command.function).parameters
    rows = [_row(p) for p in parameters.values() if _is_own(p)]
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
    """The titles of sections that a command has completely, otherwise the names of settings."""
    for section in SECTIONS:
        names = list(section.model_fields)
        there = [n for n in names if n in parameters and _panel(parameters[n]) == section.title]
        if there == names:
            yield f"all of [{section.title}](settings.md#{section.title.lower()})"
        else:
            yield from (f"`{option_of(name)}`" for name in there)


def _is_own(parameter: inspect.Parameter) -> bool:
    """True for visible options that are neither settings nor common to all commands."""
    declared = _declared(parameter)
    titles = {section.title for section in SECTIONS} | {"Common"}
    visible = declared is not None and not getattr(declared, "hidden", False)
    return visible and _panel(parameter) not in titles


def _declared(parameter: inspect.Parameter) -> Any:
    """The ``typer.Option`` or ``typer.Argument`` of a parameter, if it has one."""
    return next(iter(get_args(parameter.annotation)[1:]), None)


def _panel(parameter: inspect.Parameter) -> str | None:
    return getattr(_declared(parameter), "rich_help_panel", None)


def _row(parameter: inspect.Parameter) -> str:
    declared = _declared(parameter)
    # In an annotation typer keeps the first name in place of a default
    names = [
        name
        for name in (declared.default, *(declared.param_decls or ()))
        if isinstance(name, str) and name.startswith("--")
    ]
    words = [*names, declared.metavar or ("" if names else parameter.name)]
    about, notes = str(declared.help), ""
    if about.endswith("]"):
        about, _, notes = about.rpartition(" [")
    required = parameter.default is inspect.Parameter.empty
    default = "required" if required else notes.removeprefix("default: ").rstrip("]")
    return f"| `{_cell(' '.join(filter(None, words)))}` | {_cell(about)} | {_cell(default)} |"


def settings_page() -> str:
    """Return the page of settings with new tables; the text around them is written by hand."""
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    tables = "\n".join(["<!-- settings -->", *_settings_tables(), "", "<!-- end settings -->"])
    return _SETTINGS.sub(lambda found: tables, page)


def _settings_tables() -> Iterator[str]:
    """Describe every setting: its value, range and default, and if a resumed run may change it."""
    for section in SECTIONS:
        yield from ("", f"## {section.title}", "", "| name | meaning | value | default | |")
        yield "| --- | --- | --- | --- | --- |"
        for name, field in section.model_fields.items():
            value = ", ".join(f"`{c}`" for c in choices_of(field)) or kind_of(field)
            numbers = range_of(field)
            value += f", {numbers}" if numbers else ""
            fixed = "fixed" if name in fixed_on_resume() else ""
            default = f"`{default_text(field.default)}`"
            cells = (f"`{name}`", str(field.description), value, default, fixed)
            yield f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"commands.md": commands_page, "settings.md": settings_page}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
