"""Settings <-> options: each setting becomes one option, its help and default with it.

``@settings_command(Section, ...)`` gives a command the options of the named sections, the
common ones (``--config``, ``--json``, ``--debug``), and hands it the loaded settings.
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from clipft.cli.console import Output
from clipft.config.fields import Section, fields_of
from clipft.config.settings import SECTIONS
from clipft.config.sources import LoadedSettings, load_settings
from clipft.config.text import choices_of, default_text, kind_of, range_of

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="CLIPFT_CONFIG",
        metavar="FILE",
        help="TOML file with settings, as `clipft settings` prints it",
        rich_help_panel="Common",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on stdout", rich_help_panel="Common"),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error", rich_help_panel="Common"),
]

_COMMON = {"config": (Config, None), "as_json": (AsJson, False), "debug": (Debug, False)}


class Command:
    """A command as its module declares it; its options are made when they are asked for."""

    def __init__(
        self,
        command: Callable[..., None],
        wanted: Collection[type[Section] | str],
        profile: Mapping[str, Any] | None,
    ) -> None:
        self._command, self._wanted, self._profile = command, wanted, profile
        self.__name__ = command.__name__
        self.__doc__ = _unwrapped(command.__doc__ or "")

    @functools.cached_property
    def function(self) -> Callable[..., None]:
        """With a parameter for each option, as typer reads them."""
        generated = {
            name: (field, section)
            for section in SECTIONS
            for name, field in fields_of(section)
            if section in self._wanted or name in self._wanted
        }
        return _wrapped(self._command, generated, self._profile)


def plain_command(command: Callable[..., None]) -> Command:
    """A command with the common options but no settings; it is handed ``out``."""
    return Command(command, (), None)


def settings_command(
    *wanted: type[Section] | str, profile: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Command]:
    """A command with the options of whole sections or of single settings by name; it is
    handed ``loaded`` and ``out``. ``profile`` holds defaults of its own."""
    return lambda command: Command(command, wanted, profile or {})


def _wrapped(
    command: Callable[..., None],
    generated: dict[str, tuple[FieldInfo, type[Section]]],
    profile: Mapping[str, Any] | None,
) -> Callable[..., None]:
    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = {n: _given(given, n) for n in generated}
        config, as_json = given.pop("config"), given.pop("as_json")
        given.pop("debug")
        if profile is not None:
            chosen = {name: value for name, value in flags.items() if value is not None}
            given["loaded"] = load_settings(chosen, config, profile=profile)
        command(**given, out=Output(as_json))

    own = inspect.signature(command).parameters.values()
    parameters = [p for p in own if p.name not in {"loaded", "out"}]
    parameters += [p for n, (f, s) in generated.items() for p in _options(n, f, s, profile)]
    parameters += [_parameter(n, annotation, d) for n, (annotation, d) in _COMMON.items()]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = _unwrapped(command.__doc__ or "")
    return run


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each, for the help to wrap at the terminal's width; indented
    lines (examples) as they are."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).split("\n"):
        joins = lines and lines[-1] and line and not line.startswith(" ")
        if joins and not lines[-1].startswith(" "):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def flags_given(loaded: LoadedSettings, *names: str) -> list[str]:
    """The words that give another command the file and the flags of this one: of ``names``, or
    all."""
    files = {o.removeprefix("file ") for o in loaded.origins.values() if o.startswith("file ")}
    words = [word for file in files for word in ("--config", file)]
    for name, value in loaded.values.model_dump(mode="json").items():
        if loaded.origins[name] != "flag" or (names and name not in names):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def _given(given: dict[str, Any], name: str) -> Any:
    """What the flags say of one setting, taken out of ``given``; None: nothing."""
    value, refused = given.pop(name), given.pop(f"no_{name}", False)
    return False if refused else value


def _options(
    name: str, field: FieldInfo, section: type[Section], profile: Mapping[str, Any] | None
) -> Iterator[inspect.Parameter]:
    """The option of one setting; a switch has a hidden ``--no-`` twin.

    Text is passed on unread: the settings model judges it.
    """
    switch = field.annotation is bool
    default = (profile or {}).get(name, field.default)
    shown = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=None if switch else kind_of(name).upper(),
        help=_help(name, field, default),
        rich_help_panel=section.title,
        show_default=False,
        autocompletion=completing(name),
    )
    yield _parameter(name, Annotated[bool | None if switch else str | None, shown], None)
    if switch:
        twin = typer.Option(f"--no-{name.replace('_', '-')}", hidden=True)
        yield _parameter(f"no_{name}", Annotated[bool, twin], False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _help(name: str, field: FieldInfo, default: Any) -> str:
    choices, numbers = choices_of(name), range_of(field)
    text = str(field.description)
    if choices:  # a scenario's description names them all
        text = text if name == "scenario" else f"{'|'.join(choices)}: {text}"
    else:
        text = text[0].upper() + text[1:]
    within = f"; {numbers}" if numbers else ""
    return f"{text} [default: {default_text(default)}{within}]"


def completing(name: str) -> Callable[[str], list[str]] | None:
    """What the shell offers for a setting: its choices, or what lies in a folder."""
    if choices_of(name):
        return one_of(choices_of(name))
    return _paths if kind_of(name) == "PATH" else None


def one_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Offers those that begin as what was typed."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _paths(incomplete: str) -> list[str]:
    folder, begun = os.path.split(incomplete)
    try:
        names = sorted(name for name in os.listdir(folder or ".") if name.startswith(begun))
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names]
    return [f"{path}/" if os.path.isdir(path) else path for path in paths]
