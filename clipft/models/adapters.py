"""Opens PEFT adapters as models, by merging each into the base model that it names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipft.core.errors import ModelError
from clipft.models.complete import first_names
from clipft.models.source import ADAPTER_CONFIG


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes within the block, because the import takes a second.

    PEFT needs bitsandbytes only for quantized weights, which clipft does not accept.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    _look_for_bitsandbytes_again()
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _look_for_bitsandbytes_again()


def _look_for_bitsandbytes_again() -> None:
    """Clear PEFT's cached answer to whether bitsandbytes is installed."""
    if peft := sys.modules.get("peft.import_utils"):
        peft.is_bnb_available.cache_clear()
        peft.is_bnb_4bit_available.cache_clear()


@without_bitsandbytes()
def merge_adapter(clip: Any, source: str) -> Any:
    """Merge the adapter of a folder or hub id into its base model.

    Raises:
        ModelError: the adapter's weights are not those that its configuration declares for this
            model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    wrapped = PeftModel(clip, PeftConfig.from_pretrained(source))
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    stored = set(load_peft_weights(source, device="cpu"))
    wrong = [
        f"{len(names)} {what} ({first_names(sorted(names))})"
        for what, names in (("missing", expected - stored), ("unexpected", stored - expected))
        if names
    ]
    if wrong:
        raise ModelError(
            f"the weights of the PEFT adapter {source} do not fit its base model: "
            f"{' and '.join(wrong)}",
            "use the base model on which the adapter was trained, and keep "
            f"{ADAPTER_CONFIG} and the weights together",
        )
    wrapped.load_adapter(source, "default")
    return wrapped.merge_and_unload()
