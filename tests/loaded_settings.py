from typing import Any

from clipft.config.sources import LoadedSettings, load_settings


def loaded_settings(**flags: Any) -> LoadedSettings:
    """Settings as flags alone give them, whatever the environment says."""
    return load_settings(flags, environ={})
