"""Settings files: reading TOML, writing its values, and a commented template."""

import textwrap
from pathlib import Path
from typing import Any

from clipft.config.fields import choices_of, range_of
from clipft.config.settings import SECTIONS
from clipft.core.errors import UsageError
from clipft.core.files import did_you_mean_path
from clipft.core.text import NotText, read_text


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    A byte-order mark at its beginning is not part of the file.

    Raises:
        UsageError: the file cannot be read, or is not valid TOML.
    """
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise UsageError(
            f"cannot read the settings file {path}: {error.strerror}",
            did_you_mean_path(path) or "`clipft settings` prints one to start from",
        ) from error
    except NotText as error:
        raise UsageError(
            f"cannot read the settings file {path}: {error}", "save it as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}", "compare it with the output of `clipft settings`"
        ) from error


def template() -> str:
    """A commented settings file that sets nothing; a line without its # would set the default."""
    lines = ["# Settings of clipft, for --config. Remove the # from a line to set its value."]
    for section in SECTIONS:
        lines += ["", "", f"# {section.title}"]
        for name, field in section.model_fields.items():
            notes = "; ".join(filter(None, ["|".join(choices_of(field)), range_of(field)]))
            about = f"{field.description} ({notes})" if notes else str(field.description)
            lines += ["", *(f"# {line}" for line in textwrap.wrap(about, 96))]
            default = str(field.default) if isinstance(field.default, Path) else field.default
            value = " # not set" if default is None else toml_value(default)
            lines.append(f"#{name} = {value}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Write a string, a number or a boolean as TOML does."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        # TOML forbids control characters in strings, except as escapes
        plain = "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped)
        return f'"{plain}"'
    return repr(value)
