"""What each setting is, in words: its choices, unit, range and default, for help, templates and
documents alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from clipft.config.fields import fields_of, unit_of
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import SECTIONS, Settings
from clipft.config.sources import toml_value

_KINDS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", bool: "on|off"}


def choices_of(name: str) -> tuple[str, ...]:
    """The values of a setting with a closed list of them; else none."""
    if name == "scenario":
        return tuple(SCENARIOS)
    annotation = Settings.model_fields[name].annotation
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()


def range_of(field: FieldInfo) -> str:
    """``from 1``, ``0 to 1``; "" where any value goes."""
    bounds = {
        kind: getattr(constraint, kind)
        for constraint in field.metadata
        for kind in ("ge", "gt", "le", "lt")
        if getattr(constraint, kind, None) is not None
    }
    low = f"{bounds['ge']:g}" if "ge" in bounds else f"above {bounds['gt']:g}" if bounds else ""
    high = f"{bounds['le']:g}" if "le" in bounds else ""
    high = f"below {bounds['lt']:g}" if "lt" in bounds else high
    if low and high:
        return f"{low} to {high}"
    return f"from {low}" if "ge" in bounds else low


def kind_of(name: str) -> str:
    """What stands for a value: its unit, or its kind."""
    field = Settings.model_fields[name]
    unit = unit_of(field)
    if unit:
        return unit
    given = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = given[0] if len(given) == 1 else field.annotation
    return _KINDS.get(kind, "CHOICE" if choices_of(name) else "TEXT")


def beside_defaults(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe settings, dumped in JSON mode, by name, value, default, and whether they differ."""
    standard = Settings().model_dump(mode="json")
    return [
        {
            "name": name,
            "value": value,
            "default": standard[name],
            "changed": value != standard[name],
        }
        for name, value in values.items()
    ]


def default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def template() -> str:
    """A commented settings file in which nothing is set: each line without its # would set the
    default."""
    lines = [
        "# Settings of clipft, for --config. Without its # a line `#name = value` sets something.",
    ]
    for section in SECTIONS:
        lines += ["", "", f"# {section.title}"]
        for name, field in fields_of(section):
            lines += ["", *(f"# {line}" for line in _about(name, field)), _unset(name, field)]
    return "\n".join(lines) + "\n"


def _about(name: str, field: FieldInfo) -> list[str]:
    import textwrap

    choices, numbers = choices_of(name), range_of(field)
    text = f"{'|'.join(choices)}: {field.description}" if choices else str(field.description)
    if numbers:
        text += f" ({numbers})"
    return textwrap.wrap(text, 96)


def _unset(name: str, field: FieldInfo) -> str:
    if field.default is None:
        return f"#{name} =  # not set"
    default = str(field.default) if isinstance(field.default, Path) else field.default
    return f"#{name} = {toml_value(default)}"
