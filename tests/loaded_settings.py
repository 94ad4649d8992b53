from typing import Any

from clipft.config.sources import LoadedSettings, load_settings


def loaded_settings(**flags: Any) -> LoadedSettings:
    """Return settings from flags alone, without the environment."""
    return load_settings(flags, environ={})
