"""Command-line options, made from the fields of settings and of a command's own options.

``@command(Section, "name", ..., options=CommandOptions)`` turns a function into a command with the
options of the named settings, those of its own model, and the common ones (``--config``,
``--json``, ``--debug``). The function receives ``loaded``, ``options`` and ``out`` as it asks.
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from clipft.cli.console import Output
from clipft.config.fields import (
    Section,
    choices_of,
    default_text,
    former_name,
    placeholder_of,
    range_of,
    value_type,
)
from clipft.config.settings import SECTIONS
from clipft.config.sources import LoadedSettings, load_settings, option_of, validated
from clipft.core.common import counted, expand_home
from clipft.core.errors import StorageError

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="CLIPFT_CONFIG",
        metavar="FILE",
        help="TOML file with settings, as printed by `clipft settings`.",
        rich_help_panel="Common",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object to stdout.", rich_help_panel="Common"),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Common"),
]

_COMMON = {"config": (Config, None), "as_json": (AsJson, False), "debug": (Debug, False)}


class Command:
    """A command as its module declares it. Its options are made only when they are asked for,
    because the list of commands needs none of them."""

    def __init__(
        self,
        function: Callable[..., None],
        wanted: Collection[type[Section] | str],
        options: type[Section] | None,
        profile: Mapping[str, Any] | None,
    ) -> None:
        self._function, self._wanted = function, wanted
        self._options, self._profile = options, profile or {}
        self.__name__ = function.__name__
        self.__doc__ = _unwrapped(function.__doc__ or "")

    @functools.cached_property
    def function(self) -> Callable[..., None]:
        """The command with one parameter for each option, as typer reads them."""
        settings = {
            name: (field, section)
            for section in SECTIONS
            for name, field in section.model_fields.items()
            if section in self._wanted or name in self._wanted
        }
        model = self._options
        own = {n: (field, model) for n, field in model.model_fields.items()} if model else {}
        signature = inspect.signature(self._function).parameters

        @functools.wraps(self._function)
        def run(**given: Any) -> None:
            chosen = _taken(given, settings)
            selected = _taken(given, own)
            as_json, config = given.pop("as_json"), given.pop("config")
            config = expand_home(config) if config else None
            given.pop("debug")
            for name, value in given.items():  # the arguments; options expand ~ themselves
                given[name] = expand_home(value) if isinstance(value, Path) else value
            if "loaded" in signature:  # otherwise no setting matters, not even a wrong one
                given["loaded"] = load_settings(chosen, config, profile=self._profile)
            if model:
                given["options"] = validated(model, selected, dict.fromkeys(own, "flag"))
            out = Output(as_json)
            self._function(**given, out=out)
            loaded = given.get("loaded")
            if loaded and loaded.values.cache_limit is not None:
                _bound_cache(loaded.values.cache_limit, out)

        handed = {"loaded", "options", "out"}
        parameters = [p for name, p in signature.items() if name not in handed]
        for name, (field, section) in (own | settings).items():
            default = self._profile.get(name, field.default)
            parameters += _parameters_of(name, field, section, default)
        parameters += [_parameter(n, annotation, d) for n, (annotation, d) in _COMMON.items()]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = self.__doc__
        return run


def command(
    *wanted: type[Section] | str,
    options: type[Section] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., None]], Command]:
    """Declare a command.

    Args:
        wanted: settings that are options of the command: whole sections, or single names.
        options: the command's own options.
        profile: defaults of settings that hold for this command alone.
    """
    return lambda function: Command(function, wanted, options, profile)


def flags_given(loaded: LoadedSettings, *names: str) -> list[str]:
    """The words that give another command the settings file and the flags of this one.

    ``names`` restricts the flags to these settings.
    """
    files = {o.removeprefix("file ") for o in loaded.origins.values() if o.startswith("file ")}
    words = [word for file in files for word in ("--config", file)]
    for name, value in loaded.values.model_dump(mode="json").items():
        if loaded.origins[name] != "flag" or (names and name not in names):
            continue
        if isinstance(value, bool):
            words.append(option_of(name) if value else option_of(f"no_{name}"))
        elif str(value).startswith("-"):  # it would be read as another option
            words.append(f"{option_of(name)}={value}")
        else:
            words += [option_of(name), str(value)]
    return words


def _bound_cache(limit: float, out: Output) -> None:
    from clipft.core.cache import keep_within

    try:
        removed = keep_within(int(limit * 2**30))
    except StorageError as error:  # the command itself has done its work
        out.note(f"note: {error}")
        return
    if removed:
        freed = f"{sum(entry.bytes for entry in removed) / 2**30:.2f} GiB"
        count = counted(len(removed), "cached result")
        out.note(f"Removed {count} ({freed}) to keep the cache within {limit:g} GiB.")


def _taken(given: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Take the flags of ``fields`` out of ``given``; only those that the user has typed."""
    typed = {}
    for name, (field, _) in fields.items():
        former = former_name(field)
        former_value = given.pop(former, None) if former else None
        value, refused = given.pop(name), given.pop(f"no_{name}", False)
        value = False if refused else value if value is not None else former_value
        if value is not None and value != []:  # click gives [] for a repeatable option not used
            typed[name] = value
    return typed


def _parameters_of(
    name: str, field: FieldInfo, section: type[Section], default: Any
) -> Iterator[inspect.Parameter]:
    """The option of one field, and its hidden twins: ``--no-...`` of a setting that is a switch,
    and the former name of a field that was renamed.

    Values are passed on as text: the model they belong to validates them.
    """
    kind = value_type(field)
    switch, is_setting = kind is bool, section in SECTIONS
    read: Any = bool if switch else str
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        read = tuple[(str,) * len(get_args(kind))]  # type: ignore[misc]
    elif get_origin(kind) in {tuple, dict}:
        read = list[str]
    # An empty default is described in the text, and a command's own flag is off anyway
    told = default_text(default) != "none" and (is_setting or not switch)
    notes = [f"default: {default_text(default)}"] if told else []
    notes += [range_of(field)] if range_of(field) else []
    if switch and is_setting and default is True:  # its twin is hidden, and nobody could know it
        notes.append(f"turn it off with {option_of(f'no_{name}')}")
    option = typer.Option(
        option_of(name),
        metavar=None if switch else placeholder_of(field),
        help=f"{field.description} [{'; '.join(notes)}]" if notes else field.description,
        rich_help_panel=section.title,
        show_default=False,
        autocompletion=_completion(field),
    )
    yield _parameter(name, Annotated[read | None, option], None)
    former = former_name(field)
    if former:
        hidden = typer.Option(option_of(former), hidden=True)
        yield _parameter(former, Annotated[read | None, hidden], None)
    if switch and is_setting:  # another source may have turned it on
        hidden = typer.Option(option_of(f"no_{name}"), hidden=True)
        yield _parameter(f"no_{name}", Annotated[bool, hidden], False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _completion(field: FieldInfo) -> Callable[[str], list[str]] | None:
    """What the shell offers for a value: the choices, or the paths of a folder."""
    choices = choices_of(field)
    if choices:  # typer passes the typed text to a parameter of the name `incomplete` only
        return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]
    return _paths if value_type(field) is Path else None


def _paths(incomplete: str) -> list[str]:
    """List the paths that ``incomplete`` may be completed to; folders end in a slash."""
    folder, begun = os.path.split(incomplete)
    try:
        names = sorted(name for name in os.listdir(folder or ".") if name.startswith(begun))
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names]
    return [f"{path}/" if os.path.isdir(path) else path for path in paths]


def _unwrapped(text: str) -> str:
    """Join each paragraph into one line, so that the help can wrap it at the terminal's width;
    indented lines (examples) stay as they are."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).split("\n"):
        joins = lines and lines[-1] and line and not line.startswith(" ")
        if joins and not lines[-1].startswith(" "):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)
