"""clipft fine-tunes CLIP on your own image-text pairs and measures the gain.

The names of ``__all__`` are loaded when they are first used: ``import clipft`` loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipft.api import (
        EvaluatedModel,
        TunedModel,
        evaluate,
        load_model,
        train,
    )
    from clipft.config.settings import Settings
    from clipft.config.sources import load_settings
    from clipft.core.errors import ClipftError
    from clipft.evaluation.compare import Request
    from clipft.runs.records import Callbacks
    from clipft.training.state import TrainResult

__version__ = "0.1.0"

__all__ = [
    "Callbacks",
    "ClipftError",
    "EvaluatedModel",
    "Request",
    "Settings",
    "TrainResult",
    "TunedModel",
    "evaluate",
    "load_model",
    "load_settings",
    "train",
]

_HOMES = {
    "ClipftError": "clipft.core.errors",
    "Request": "clipft.evaluation.compare",
    "Settings": "clipft.config.settings",
    "TrainResult": "clipft.training.state",
    "Callbacks": "clipft.training.run",
    "load_settings": "clipft.config.sources",
}
"""Of those that ``clipft.api`` does not define itself."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "clipft.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
