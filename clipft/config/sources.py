"""Where settings come from. The strongest source wins: a flag, the environment (``CLIPFT_LR``),
a TOML file (``--config``), a profile (``--mini-train``, the scenario), the default.

``load_settings`` merges the sources, validates once, and records where each value came from.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from clipft.config.fields import Section, choices_of, current_names
from clipft.config.prompts import SEPARATOR, lines_of
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import LABELS, MINI_TRAIN, SECTIONS, Settings
from clipft.config.settings_file import read_toml, toml_value
from clipft.core.cache import cache_folder
from clipft.core.errors import UsageError, did_you_mean, unknown_choice

ENV_PREFIX = "CLIPFT_"
ENV_OTHERS = frozenset({"CLIPFT_CONFIG", "CLIPFT_CACHE"})
"""Environment variables of clipft that are not settings."""

_PLAINER = {
    "Input should be": "must be",
    "a valid integer": "a whole number",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
"""Phrases of pydantic's messages, and plainer ones."""

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class S3Url:
    """A place in a bucket. ``prefix`` has no slashes at its ends; "" is the whole bucket."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def below(self, name: str) -> str:
        """The prefix of ``name`` inside this place."""
        return f"{self.prefix}/{name}".lstrip("/")


def parse_s3_url(text: object) -> S3Url | None:
    """Parse ``s3://bucket/prefix``; None if it is something else.

    Raises:
        UsageError: the URL names no bucket.
    """
    # A Path object turns the two slashes after the scheme into one
    found = re.fullmatch(r"s3:/+([^/]*)(.*)", str(text), re.DOTALL | re.IGNORECASE)
    if not found:
        return None
    if not found[1]:
        raise UsageError(f"{text} has no bucket name", "write it as s3://bucket/prefix")
    return S3Url(found[1], found[2].strip("/"))


@dataclass(frozen=True)
class LoadedSettings:
    """Validated settings and, for each name, where its value came from."""

    values: Settings
    origins: dict[str, str]

    def is_default(self, name: str) -> bool:
        """True if nobody set the value. The rate that a scenario brings is a default too."""
        origin = self.origins[name]
        return origin == "default" or origin.startswith("scenario ")

    def given(self) -> dict[str, Any]:
        """The settings that the user has set, wherever it was, by name."""
        places = {"flag", "environment"}
        return {
            name: getattr(self.values, name)
            for name, origin in self.origins.items()
            if origin in places or origin.startswith("file ")
        }

    def to_toml(self) -> str:
        """Print the settings as TOML that ``--config`` reads back, each line with its origin."""
        lines = ["# clipft settings: flags > CLIPFT_... > file > profile > default"]
        dumped = self.values.model_dump(mode="json")
        for section in SECTIONS:
            lines += ["", f"# {section.title}"]
            for name in section.model_fields:
                if dumped[name] is None:  # TOML has no null
                    lines.append(f"# {name} is not set")
                else:
                    lines.append(f"{name} = {toml_value(dumped[name])}  # {self.origins[name]}")
        return "\n".join(lines) + "\n"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> LoadedSettings:
    """Merge the sources and validate the result.

    Args:
        flags: values from the command line or from Python.
        config: a TOML file.
        environ: the environment; None for that of this process.
        profile: defaults of one command.

    Raises:
        UsageError: every mistake at once, each with its source.
    """
    sources = [
        (current_names(Settings, flags or {}), "flag"),
        (_from_environment(os.environ if environ is None else environ), "environment"),
        (known_settings(read_toml(config), config) if config else {}, f"file {config}"),
        (dict(profile or {}), "command"),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    for source, origin in [*sources, *_profiles(sources)]:
        for name, value in source.items():
            if name not in values:
                values[name], origins[name] = value, origin
    _expand_data_url(values, origins)
    _read_prompts(values)
    return LoadedSettings(validated(Settings, values, origins), origins)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    given = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        # Set but empty is as good as not set: `CLIPFT_LR= clipft train`
        if name.startswith(ENV_PREFIX) and name not in ENV_OTHERS and value.strip()
    }
    values = current_names(Settings, given)
    refuse_unknown(values, Settings, "environment")
    return values


def _profiles(sources: list[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """The defaults that another setting brings: a smoke test's and a scenario's."""

    def chosen(name: str) -> Any:
        given = (source[name] for source, _ in sources if name in source)
        return next(given, Settings.model_fields[name].default)

    profiles: list[tuple[dict[str, Any], str]] = []
    # Values are not validated yet, so a flag or a variable is still text
    if str(chosen("mini_train")).lower() in {"true", "1", "yes", "on"}:
        profiles.append((dict(MINI_TRAIN), "mini_train"))
    if chosen("label_prompts"):
        profiles.append((dict(LABELS), "label_prompts"))
    scenario = SCENARIOS.get(chosen("scenario"))
    if scenario and scenario.lr is not None:
        profiles.append(({"lr": scenario.lr}, f"scenario {scenario.name}"))
    return profiles


def _read_prompts(values: dict[str, Any]) -> None:
    """Replace a file of prompts by its content, which the run then keeps in its settings.

    Raises:
        UsageError: it cannot be read.
    """
    given = str(values.get("label_prompts", ""))
    if given and (prompts := lines_of("--label-prompts", given)):
        values["label_prompts"] = f" {SEPARATOR} ".join(prompts)


def _expand_data_url(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Replace ``--data-dir s3://bucket/prefix`` by the bucket, its three prefixes, and a folder of
    the cache to download to.

    Raises:
        UsageError: another bucket is set as well.
    """
    url = parse_s3_url(values.get("data_dir", ""))
    if url is None:
        return
    if values.get("s3_bucket") not in {None, url.bucket}:
        raise UsageError(
            f"--data-dir {url} is not in bucket {values['s3_bucket']}",
            "omit --s3-bucket, or name a folder with --data-dir",
        )
    origin = origins["data_dir"]
    for name, value in settings_of_data(url).items():
        if name == "data_dir" or name not in values:
            values[name], origins[name] = value, origin


def settings_of_data(url: S3Url) -> dict[str, Any]:
    """The settings that an S3 URL in place of a data folder implies."""
    return {
        "data_dir": cached_bucket(url.bucket) / url.prefix,
        "s3_bucket": url.bucket,
        "s3_prefix": url.below("train"),
        "s3_val_prefix": url.below("val"),
        "s3_test_prefix": url.below("test"),
    }


def cached_bucket(bucket: str) -> Path:
    """The folder of the cache for what commands download from a bucket."""
    return cache_folder() / "s3" / bucket


def known_settings(values: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """Values by the current names of settings.

    Raises:
        UsageError: some names are not settings; ``source`` is where they were given.
    """
    current = current_names(Settings, values)
    refuse_unknown(current, Settings, source)
    return current


def refuse_unknown(names: Iterable[str], section: type[Section], source: Path | str) -> None:
    """Refuse names that are not fields of ``section``; ``source`` is where they were given.

    Raises:
        UsageError: some names are unknown.
    """
    unknown = [name for name in names if name not in section.model_fields]
    if not unknown:
        return
    shown = f"{', '.join(unknown)} in {source}"
    spell: Callable[[str], str] = str
    if source == "environment":
        spell = partial(_spelled, origin="environment")
        shown = spell(unknown[0])
    hint = "`clipft settings` lists every name"
    if section is not Settings:
        hint = f"the names are {', '.join(section.model_fields)}"
    meant = did_you_mean(unknown[0], section.model_fields, spell)
    raise UsageError(f"unknown setting {shown}", meant or hint)


def validated(
    section: type[AnySection], values: Mapping[str, Any], origins: Mapping[str, str]
) -> AnySection:
    """Build a section from values of any source; ``origins`` tells where each was given.

    Raises:
        UsageError: every wrong value, each spelled as its user wrote it.
    """
    try:
        return section(**values)
    except ValidationError as error:
        lines = []
        for mistake in error.errors():
            name = str(mistake["loc"][0])
            # Without the user name and the password of a URL
            shown = re.sub(r"(?<=//)[^/]*@", "...@", repr(mistake["input"]))
            if mistake["type"] == "literal_error":
                choices = choices_of(section.model_fields[name])
                reason = unknown_choice(str(mistake["input"]), choices)
            else:
                reason = str(mistake["msg"]).removeprefix("Value error, ")
                for theirs, ours in _PLAINER.items():
                    reason = reason.replace(theirs, ours)
                reason = reason.partition(", unable to parse")[0]
            lines.append(f"{_spelled(name, origins[name])} {shown}: {reason}")
        hint = "`clipft settings` shows every value and its source"
        if section is not Settings:
            hint = "the --help of the command describes its options"
        raise UsageError("; ".join(lines), hint) from error


def _spelled(name: str, origin: str) -> str:
    """The name of a setting as its user wrote it."""
    if origin == "flag":
        return option_of(name)
    if origin == "environment":
        return f"{ENV_PREFIX}{name.upper()}"
    return f"{name} in {origin.removeprefix('file ')}"


def option_of(name: str) -> str:
    """The command-line option of a field: ``data_dir`` becomes ``--data-dir``.

    A trailing underscore, which keeps a field apart from a method of its class, is dropped.
    """
    return f"--{name.rstrip('_').replace('_', '-')}"
