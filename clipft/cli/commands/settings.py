"""``clipft settings``: what would be used, and where each value comes from."""

import json
from typing import Annotated

import typer

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.config.settings import SECTIONS, Settings
from clipft.config.sources import LoadedSettings
from clipft.config.text import template as commented
from clipft.core.errors import UsageError

_PANEL = "Instead"
Template = Annotated[
    bool,
    typer.Option(
        "--template",
        help="A settings file that explains each setting and sets none",
        rich_help_panel=_PANEL,
    ),
]
Schema = Annotated[
    bool,
    typer.Option(
        "--schema",
        help="The JSON schema of a settings file, for editors",
        rich_help_panel=_PANEL,
    ),
]


@settings_command(*SECTIONS)
def settings(
    loaded: LoadedSettings, out: Output, template: Template = False, schema: Schema = False
) -> None:
    """Print the settings as TOML, each with its source.

    Examples:

        clipft settings > clipft.toml
        clipft settings --config clipft.toml --lr 3e-4
        CLIPFT_LR=3e-4 clipft settings --scenario vision_lora
        clipft settings --template > clipft.toml
        clipft settings --schema > clipft.schema.json
    """
    if template and schema:
        raise UsageError("--template and --schema are two things", "ask for one of them")
    if schema:
        described = Settings.model_json_schema()
        out.raw(described, json.dumps(described, indent=2) + "\n")
        return
    if template:
        out.raw({"template": commented()}, commented())
        return
    values = loaded.values.model_dump(mode="json")
    out.raw({"settings": values, "origins": loaded.origins}, loaded.to_toml())
