"""``clipft settings``: what would be used, and where each value comes from."""

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.settings import SECTIONS
from clipft.settings_sources import LoadedSettings


@settings_command(*SECTIONS)
def settings(loaded: LoadedSettings, out: Output) -> None:
    """Print the effective settings as TOML, each with its source.

    Examples:

        clipft settings > clipft.toml
        clipft train --config clipft.toml
        CLIPFT_LR=3e-4 clipft settings --scenario vision_lora
    """
    values = loaded.values.model_dump(mode="json")
    out.raw({"settings": values, "origins": loaded.origins}, loaded.to_toml())
