"""Where settings come from, strongest first: a flag, the environment (``CLIPFT_LR``), a TOML
file (``--config``), a profile (``--mini-train``, the scenario), the default.

``load_settings`` merges them, validates once, and remembers where each value came from.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from clipft.config.fields import fields_of
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import MINI_TRAIN, SECTIONS, EvaluationSettings, Settings
from clipft.core.common import cache_folder
from clipft.core.errors import UsageError, did_you_mean, unknown_choice

SCHEME = "s3://"


@dataclass(frozen=True)
class S3Url:
    """``prefix`` without slashes at its ends; "" is the whole bucket."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"

    def below(self, name: str) -> str:
        """The prefix of what lies in it under ``name``."""
        return f"{self.prefix}/{name}".lstrip("/")


def parse_s3_url(text: object) -> S3Url | None:
    """None: it is no such URL. A path object has lost one of the slashes.

    Raises:
        UsageError: it names no bucket.
    """
    found = re.fullmatch(r"s3:/+([^/]*)(.*)", str(text), re.DOTALL | re.IGNORECASE)
    if not found:
        return None
    if not found[1]:
        raise UsageError(f"{text} names no bucket", "write it like s3://bucket/prefix")
    return S3Url(found[1], found[2].strip("/"))


ENV_PREFIX = "CLIPFT_"
ENV_OTHERS = frozenset({"CLIPFT_CONFIG", "CLIPFT_CACHE"})
"""Names of the environment that are clipft's without being settings."""

_PLAINER = {
    "Input should be": "must be",
    "a valid integer": "a whole number",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
"""Words of pydantic, and ours."""

JUDGED_ANEW = (
    "data_dir",
    "caption",
    "num_workers",
    "max_val_pairs",
    "max_bad",
    "micro_batch_size",
    "precision",
    "device",
    "group_field",
    *EvaluationSettings.model_fields,
)
"""Settings of an evaluation that are not those of the checkpoint where they are given."""


@dataclass(frozen=True)
class LoadedSettings:
    """Validated settings and, for each, where its value came from."""

    values: Settings
    origins: dict[str, str]

    def to_toml(self) -> str:
        """The settings as TOML that ``--config`` reads back, each line with its origin."""
        lines = ["# clipft settings: flags > CLIPFT_... > file > profile > default"]
        dumped = self.values.model_dump(mode="json")
        for section in SECTIONS:
            lines += ["", f"# {section.title}"]
            for name, _ in fields_of(section):
                value, origin = dumped[name], self.origins[name]
                text = f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"
                lines.append(f"{text}  # {origin}" if value is not None else text)
        return "\n".join(lines) + "\n"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> LoadedSettings:
    """Merge the sources, validate once. ``profile`` are the defaults of one command.

    Raises:
        UsageError: with every mistake at once, each naming its source.
    """
    sources = [
        (dict(flags or {}), "flag"),
        (_from_environment(os.environ if environ is None else environ), "environment"),
        (_from_file(config) if config else {}, f"file {config}"),
        (dict(profile or {}), "command"),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    for source, origin in [*sources, *_profiles(sources)]:
        for name, value in source.items():
            if name not in values:
                values[name], origins[name] = value, origin
    _expand_data_url(values, origins)
    try:
        return LoadedSettings(Settings(**values), origins)
    except ValidationError as error:
        raise _mistakes(error, origins) from error


def _expand_data_url(values: dict[str, Any], origins: dict[str, str]) -> None:
    """``--data-dir s3://bucket/prefix``: the bucket, its two prefixes, and a folder of the
    cache to bring them to.

    Raises:
        UsageError: another bucket is set beside it.
    """
    url = parse_s3_url(values.get("data_dir", ""))
    if url is None:
        return
    if values.get("s3_bucket") not in {None, url.bucket}:
        raise UsageError(
            f"--data-dir {url} is not in bucket {values['s3_bucket']}",
            "leave out --s3-bucket, or name a folder with --data-dir",
        )
    origin = origins["data_dir"]
    for name, value in settings_of_data(url).items():
        if name == "data_dir" or name not in values:
            values[name], origins[name] = value, origin


def settings_of_data(url: S3Url) -> dict[str, Any]:
    """What a location in the place of a folder of pairs sets."""
    return {
        "data_dir": cached_bucket(url.bucket) / url.prefix,
        "s3_bucket": url.bucket,
        "s3_prefix": url.below("train"),
        "s3_val_prefix": url.below("val"),
    }


def cached_bucket(bucket: str) -> Path:
    """The folder that what commands name in a bucket is brought to."""
    return cache_folder() / "s3" / bucket


def _profiles(sources: list[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """Defaults that follow from another setting: a smoke test's, a scenario's."""

    def chosen(name: str) -> Any:
        given = (source[name] for source, _ in sources if name in source)
        return next(given, Settings.model_fields[name].default)

    profiles: list[tuple[dict[str, Any], str]] = []
    if str(chosen("mini_train")).lower() in {"true", "1", "yes", "on"}:
        profiles.append((dict(MINI_TRAIN), "mini_train"))
    scenario = SCENARIOS.get(chosen("scenario"))
    if scenario and scenario.lr is not None:
        profiles.append(({"lr": scenario.lr}, f"scenario {scenario.name}"))
    return profiles


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHERS:
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in Settings.model_fields:
            raise _unknown_name(name, key, lambda near: ENV_PREFIX + near.upper())
        values[key] = None if value == "" else value
    return values


def _from_file(path: Path) -> dict[str, Any]:
    values = read_toml(path)
    refuse_unknown(values, path)
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read settings file {path}: {error}", "check the path and the file"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not TOML: {error}", "compare with the output of `clipft settings`"
        ) from error


def refuse_unknown(names: Iterable[str], source: Path | str) -> None:
    """
    Raises:
        UsageError: some are not the names of settings.
    """
    unknown = [name for name in names if name not in Settings.model_fields]
    if unknown:
        raise _unknown_name(f"{', '.join(unknown)} in {source}", unknown[0], str)


def _unknown_name(shown: str, key: str, spell: Any) -> UsageError:
    meant = did_you_mean(key, Settings.model_fields, spell)
    return UsageError(f"unknown setting {shown}", meant or "`clipft settings` lists every name")


def _mistakes(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    lines = []
    for mistake in error.errors():
        name = str(mistake["loc"][0])
        lines.append(
            f"{_spelled(name, origins[name])} {_shown(mistake['input'])}: {_reason(mistake)}"
        )
    return UsageError("; ".join(lines), "`clipft settings` shows every value and its source")


def _reason(mistake: Any) -> str:
    if mistake["type"] == "literal_error":
        annotation = Settings.model_fields[str(mistake["loc"][0])].annotation
        return unknown_choice(str(mistake["input"]), get_args(annotation))
    message = str(mistake["msg"]).removeprefix("Value error, ")
    for theirs, ours in _PLAINER.items():
        message = message.replace(theirs, ours)
    return message.partition(", unable to parse")[0]


def _shown(value: Any) -> str:
    """A value as it was given, without the user and the password of a URL."""
    return re.sub(r"(?<=//)[^/]*@", "...@", repr(value))


def _spelled(name: str, origin: str) -> str:
    """A setting as its user wrote it."""
    if origin == "flag":
        return f"--{name.replace('_', '-')}"
    if origin == "environment":
        return f"{ENV_PREFIX}{name.upper()}"
    return f"{name} in {origin.removeprefix('file ')}"


def toml_value(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return (
            '"'
            + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped)
            + '"'
        )
    return repr(value)
