"""The parts of a setting: default, description, range, and what may change on resume.

Settings and the options of single commands are declared with the same ``setting`` helper, so one
place describes them for the help, for settings files and for the documentation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from clipft.core.common import expand_home
from clipft.core.part import Part
from clipft.core.text import is_unicode

_KINDS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", bool: "on|off"}


class Section(BaseModel):
    """A group of settings, or the options of one command, shown under one title."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        hide_input_in_errors=True,  # the input may be a secret
        defer_build=True,  # help needs no validators, and building them takes a third of its time
    )
    title: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Accept former names, and ``~`` in paths, from whichever source the values come."""
        if not isinstance(values, Mapping):
            return values
        return {
            name: _home_expanded(value_type(cls.model_fields[name]), value)
            if name in cls.model_fields
            else value
            for name, value in current_names(cls, values).items()
        }

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_other_encodings(cls, value: Any) -> Any:
        # A run writes its settings to a TOML file, which is UTF-8
        if isinstance(value, str | Path) and not is_unicode(value):
            what = "name" if isinstance(value, Path) else "text"
            raise ValueError(f"the {what} is not UTF-8")
        return value


def setting(
    default: Any,
    text: str,
    on_resume: Literal["fixed", "free"] = "free",
    *,
    unit: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    formerly: str | None = None,
    **constraints: Any,
) -> Any:
    """Declare a setting with its default and its description.

    Args:
        on_resume: ``fixed`` settings decide the weights, so a resumed run keeps them.
        unit: what a number counts; also its placeholder in the help.
        metavar: the placeholder in the help where neither unit nor type says enough.
        choices: the accepted values of a setting that is not declared as a ``Literal``.
        formerly: an earlier name, still accepted wherever the setting can be given.
        constraints: ``ge``, ``gt``, ``le`` and ``lt``, as pydantic takes them.
    """
    extra = {"fate": on_resume, "unit": unit, "metavar": metavar, "formerly": formerly}
    known: dict[str, Any] = {name: value for name, value in extra.items() if value is not None}
    if choices:
        known["enum"] = list(choices)  # the keyword of JSON schema, for editors
    return Field(default, description=text, json_schema_extra=known, **constraints)


def _home_expanded(kind: Any, value: Any) -> Any:
    """Replace ``~`` where ``kind``, the type of the value, is a path or contains one."""
    if kind is Path and str(value).startswith("~"):
        return expand_home(value)
    kinds = get_args(kind)
    if get_origin(kind) is tuple and Path in kinds and isinstance(value, tuple | list):
        return tuple(map(_home_expanded, kinds, value))
    return value


def _refuse_folder(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("is a folder, but must be a file")
    return path


File = Annotated[Path, AfterValidator(_refuse_folder)]
"""A path that may be missing, but must not be a folder."""


def _parse_part(value: Any) -> Any:
    return Part.parse(value) if isinstance(value, str) else value


Share = Annotated[Part, BeforeValidator(_parse_part)]
"""A part of the work, given as I/N."""


def former_name(field: FieldInfo) -> str | None:
    """The earlier name under which the setting is still accepted, if it was renamed."""
    return extra_of(field).get("formerly")


def current_names(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former names by current ones; a value under the current name wins."""
    former = {former_name(field): name for name, field in section.model_fields.items()}
    renamed = {former[name]: value for name, value in values.items() if name in former}
    return renamed | {name: value for name, value in values.items() if name not in former}


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The accepted values of a setting that has a closed list of them, otherwise none."""
    if get_origin(field.annotation) is Literal:
        return tuple(map(str, get_args(field.annotation)))
    return tuple(extra_of(field).get("enum", ()))


def range_of(field: FieldInfo) -> str:
    """The accepted range in words, such as ``at least 1`` or ``0 to 1``; empty if there is none."""
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
    return f"at least {low}" if "ge" in bounds else low


def kind_of(field: FieldInfo) -> str:
    """What a value is, in a word: its unit, or a name for its type."""
    kind = _KINDS.get(value_type(field), "CHOICE" if choices_of(field) else "TEXT")
    return str(extra_of(field).get("unit", kind))


def placeholder_of(field: FieldInfo) -> str:
    """The placeholder for a value in the help of a command."""
    return str(extra_of(field).get("metavar", kind_of(field).upper()))


def value_type(field: FieldInfo) -> Any:
    """The type of a setting's value, without ``None`` and without ``Annotated``."""
    alternatives = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    optional = type(None) in get_args(field.annotation)
    kind = alternatives[0] if optional else field.annotation
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def default_text(value: Any) -> str:
    """A default as the help and the documentation show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None or value in ("", (), {}) else str(value)


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What ``setting`` notes beside a field's default and range, by the names used there."""
    assert isinstance(field.json_schema_extra, dict), "declare it with `setting`"
    return field.json_schema_extra


def names_in(value: str) -> list[str]:
    """Split a list of names at its commas."""
    return [name for part in value.split(",") if (name := part.strip())]
