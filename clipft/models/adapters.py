"""Opens PEFT adapters as models: the adapter is merged into the base model that it names."""

import json
from pathlib import Path
from typing import Any

from clipft.core.errors import ModelError
from clipft.models.complete import first_names

ADAPTER_CONFIG = "adapter_config.json"


def base_of_adapter(source: str) -> str | None:
    """Return the name of the base model of an adapter; None for a model that is no adapter.

    Args:
        source: a folder or a hub id.

    Raises:
        ModelError: it holds both an adapter and a whole model, or the adapter names no base.
    """
    from transformers import PretrainedConfig
    from transformers.utils import find_adapter_config_file

    path = find_adapter_config_file(source)
    if path is None:
        return None
    folder = Path(source)
    if folder.is_dir():
        whole = (folder / "config.json").is_file()
    else:
        try:
            whole = bool(PretrainedConfig.get_config_dict(source)[0])
        except OSError:
            whole = False
    if whole:
        raise ModelError(
            f"{source} holds a whole model and a PEFT adapter: it is not clear whether the "
            "adapter is already merged",
            f"keep {ADAPTER_CONFIG} and the adapter's weights in a folder of their own",
        )
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the PEFT adapter in {source} does not say to which model it belongs",
            f"write the model into base_model_name_or_path of {ADAPTER_CONFIG}",
        )
    return str(base)


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
