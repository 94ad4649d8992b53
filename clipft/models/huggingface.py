"""A tuned model -> folders that other libraries open: transformers, PEFT, sentence-transformers.

Weights are safetensors. Nothing that is written names a path of this machine.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.models.pretrained import TINY, BaseModel, Processors, load_processors
from clipft.models.trainable import TrainableModel

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")
_TINY_LICENSE = "apache-2.0"
_CARD_TIMEOUT = 5.0

_SENTENCE_MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.base.modules.transformer.Transformer",
    },
    {
        "idx": 1,
        "name": "1",
        "path": "1_Normalize",
        "type": "sentence_transformers.base.modules.normalize.Normalize",
    },
]
_SENTENCE_FILES: dict[str, Any] = {
    "modules.json": _SENTENCE_MODULES,
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    "1_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
}
"""As sentence-transformers 6 writes a CLIP itself, with unit embeddings at the end."""


def _sentence_files(base: BaseModel) -> dict[str, Any]:
    """File -> content."""
    transformer: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
            for kind in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    }
    if base.architecture.fills_texts:
        transformer["processing_kwargs"] = {
            "text": {
                "padding": "max_length",
                "max_length": base.inputs.context_length,
                "return_attention_mask": False,  # the tower was trained to see the filling
            }
        }
    return {**_SENTENCE_FILES, "sentence_bert_config.json": transformer}


def hub_id(name: str) -> str | None:
    """``name`` where it is one of the hub's, not a folder's and not ``tiny``."""
    local = name == TINY or Path(name).exists()
    return name if not local and _HUB_ID.fullmatch(name) else None


def public_name(name: str) -> str:
    """What others may read of a base model: of a folder its own name, not where it lies."""
    return hub_id(name) or (name if name == TINY else Path(name).resolve().name)


def license_of(name: str) -> str | None:
    """The licence that the model's own card states; None: no card, or none in it."""
    from huggingface_hub import ModelCard, hf_hub_download

    if name == TINY:
        return _TINY_LICENSE
    try:
        known = hub_id(name)
        path = (
            hf_hub_download(known, "README.md", etag_timeout=_CARD_TIMEOUT)
            if known
            else Path(name) / "README.md"
        )
        found = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:  # no network, no card, a card that is no YAML: it is not known
        return None
    return str(found) if found else None


def write_adapter(model: TrainableModel, base: str, folder: Path) -> None:
    """The PEFT adapter alone, with the trained projections.

    Raises:
        UsageError: nothing of the model is an adapter.
        OSError: the disk refuses.
    """
    if not has_adapter(model):
        raise UsageError(
            "this scenario trains no adapter", "export it with --format transformers instead"
        )
    with _disk_errors():
        model.clip.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    # Not before: PEFT looks for the base model's files under the name it has
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = public_name(base)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_adapter(model: TrainableModel) -> bool:
    return hasattr(model.clip, "peft_config")


def merged(model: TrainableModel) -> Any:
    """The plain ``transformers`` model with adapters merged into its weights, in eval mode;
    ``model`` is used up."""
    clip = model.clip.merge_and_unload() if has_adapter(model) else model.clip
    if given_bias(model) is not None:
        del clip.logit_bias
    return clip.eval()


def given_bias(model: TrainableModel) -> float | None:
    """What the sigmoid loss added to a model whose class in transformers has no place for it."""
    bias = model.logit_bias
    return None if bias is None or model.architecture.loss == "siglip" else bias.item()


def write_transformers(clip: Any, base: BaseModel, folder: Path) -> None:
    """Weights, configuration, tokenizer and image processor of a merged model.

    Raises:
        OSError: the disk refuses.
    """
    with _disk_errors():
        clip.save_pretrained(str(folder))
        write_processors(base, folder)


def write_processors(base: BaseModel, folder: Path) -> None:
    """Tokenizer and image processor, as the base model has them, but that texts are cut where
    the model's context ends: some tokenizers carry the length of their last use."""
    processors = _processors(base)
    processors.tokenizer.save_pretrained(str(folder))
    processors.image_processor.save_pretrained(str(folder))


def processor_of(base: BaseModel) -> Any:
    """The same two as one processor of ``transformers``, of the model's own class.

    Raises:
        ModelError: its files cannot be had.
    """
    import transformers

    found = _processors(base)
    kind = getattr(transformers, base.architecture.processor_class)
    return kind(image_processor=found.image_processor, tokenizer=found.tokenizer)


def _processors(base: BaseModel) -> Processors:
    processors = load_processors(base.name)
    tokenizer = processors.tokenizer
    tokenizer.model_max_length = base.inputs.context_length
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    for of_last_use in ("max_length", "stride", "truncation_strategy"):
        tokenizer.init_kwargs.pop(of_last_use, None)
    return processors


def write_sentence_transformers(clip: Any, base: BaseModel, folder: Path) -> None:
    """The same folder with what ``SentenceTransformer(folder)`` needs; its ``encode`` takes
    texts and pictures and gives unit embeddings.

    Raises:
        OSError: the disk refuses.
    """
    write_transformers(clip, base, folder)
    for name, content in _sentence_files(base).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _disk_errors() -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # its own kind, also for a full disk
        raise OSError(str(error)) from error
