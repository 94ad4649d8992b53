"""What a setting is made of: a default, a sentence, its fate on resume, its unit, its range."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Fate = Literal["fixed", "free"]


class Section(BaseModel):
    """A group of settings under one title."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may be a secret
        defer_build=True,  # help needs no validators, and they take a third of its time
    )
    title: ClassVar[str]


def setting(
    default: Any, text: str, fate: Fate = "free", unit: str | None = None, **constraints: Any
) -> Any:
    """A setting. ``fixed`` ones decide the weights: a resumed run keeps them as they were.
    ``unit``: what a number counts."""
    extra: dict[str, Any] = {"fate": fate} | ({"unit": unit} if unit else {})
    return Field(default, description=text, json_schema_extra=extra, **constraints)


def fields_of(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings that ``section`` itself declares, in order."""
    yield from section.model_fields.items()


def fate_of(field: FieldInfo) -> str:
    return str(_extra(field)["fate"])


def unit_of(field: FieldInfo) -> str | None:
    """What its numbers count; None: nothing that has a name."""
    unit = _extra(field).get("unit")
    return None if unit is None else str(unit)


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict), "made by ``setting``"
    return field.json_schema_extra
