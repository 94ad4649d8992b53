"""clipft fine-tunes CLIP on your own image-text pairs and measures the gain.

``import clipft`` loads nothing: each name in ``__all__`` is imported when it is first used.
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
    from clipft.evaluation.request import Request
    from clipft.runs.records import Callbacks, TrainingCallback
    from clipft.training.state import TrainResult

    Watchers = Callbacks

__version__ = "0.1.0"

__all__ = [
    "Callbacks",
    "ClipftError",
    "EvaluatedModel",
    "Request",
    "Settings",
    "TrainResult",
    "TrainingCallback",
    "TunedModel",
    "evaluate",
    "load_model",
    "load_settings",
    "train",
]

_MODULES = {
    "Callbacks": "clipft.runs.records",
    "ClipftError": "clipft.core.errors",
    "Request": "clipft.evaluation.request",
    "Settings": "clipft.config.settings",
    "TrainResult": "clipft.training.state",
    "TrainingCallback": "clipft.runs.records",
    "load_settings": "clipft.config.sources",
}
"""The modules of the names that ``clipft.api`` does not define itself."""

_FORMER_NAMES = {"Watchers": "Callbacks"}


def __getattr__(name: str) -> Any:
    current = _FORMER_NAMES.get(name, name)
    if current not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(current, "clipft.api")), current)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
