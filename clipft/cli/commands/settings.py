"""``clipft settings``: the settings that would be used, and where each value comes from."""

import json

from clipft.cli.console import Output
from clipft.cli.options import command
from clipft.config.fields import Section, setting
from clipft.config.settings import SECTIONS, Settings
from clipft.config.settings_file import template
from clipft.config.sources import LoadedSettings
from clipft.core.errors import UsageError


class SettingsOptions(Section):
    title = "Output"
    template: bool = setting(
        False, "Print a settings file that explains every setting and sets none."
    )
    # pydantic's models have a method `schema`
    schema_: bool = setting(False, "Print the JSON schema of a settings file, for editors.")


@command(*SECTIONS, options=SettingsOptions)
def settings(loaded: LoadedSettings, options: SettingsOptions, out: Output) -> None:
    """Print the settings as TOML, each with its source.

    The source, such as a flag, a file or the default, is a comment after the value. Save the
    output to a file and pass it to --config to use the same settings again.

    Examples:

        clipft settings > clipft.toml
        clipft settings --config clipft.toml --lr 3e-4
        CLIPFT_LR=3e-4 clipft settings --scenario vision_lora
        clipft settings --template > clipft.toml
        clipft settings --schema > clipft.schema.json
    """
    if options.template and options.schema_:
        raise UsageError("--template and --schema cannot be used together", "choose one of them")
    if options.schema_:
        schema = Settings.model_json_schema()
        out.raw(schema, json.dumps(schema, indent=2) + "\n")
    elif options.template:
        out.raw({"template": template()}, template())
    else:
        values = loaded.values.model_dump(mode="json")
        out.raw({"settings": values, "origins": loaded.origins}, loaded.to_toml())
