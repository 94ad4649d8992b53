"""Writes fine-tuned models as folders that transformers, PEFT and sentence-transformers open.

Weights are safetensors. Nothing that is written names a path of this machine.
"""

import json
import re
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.models.open_clip.names import HUB, is_open_clip, public_open_clip_name
from clipft.models.open_clip.weights import disk_errors
from clipft.models.pretrained import PretrainedModel
from clipft.models.source import TINY, loading_errors, model_source
from clipft.models.trainable import TrainableModel

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")
_TINY_LICENSE = "apache-2.0"
_CARD_TIMEOUT = 5.0
"""Seconds to wait for the hub to answer for a model card."""

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
"""The files that sentence-transformers 6 writes for a CLIP, and a final normalization."""


def hub_id(name: str) -> str | None:
    """Return ``name`` if it is a model of the hub; None for a folder and for ``tiny``."""
    if name.startswith(HUB):
        return name.removeprefix(HUB)
    local = name == TINY or is_open_clip(name) or Path(name).exists()
    return name if not local and _HUB_ID.fullmatch(name) else None


def public_name(name: str) -> str:
    """Return a model's name for publication: for a folder, only the last part of its path."""
    if is_open_clip(name):
        return public_open_clip_name(name)
    return hub_id(name) or (name if name == TINY else Path(name).resolve().name)


def license_of(name: str) -> str | None:
    """Return the license in the model's card; None if there is no card, or no license in it."""
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
    except Exception:  # no network, no card, or no valid YAML: the license is then unknown
        return None
    return str(found) if found else None


def has_adapter(model: TrainableModel) -> bool:
    return hasattr(model.clip, "peft_config")


def added_bias(model: TrainableModel) -> float | None:
    """Return the bias that the sigmoid loss added to a model whose class in transformers has none;
    None if no bias was added."""
    bias = model.logit_bias
    return None if bias is None or model.architecture.loss == "siglip" else bias.item()


def merged(model: TrainableModel) -> Any:
    """Merge adapters into the weights and return the plain transformers model, in eval mode.

    ``model`` must not be used afterwards.
    """
    clip = model.clip.merge_and_unload() if has_adapter(model) else model.clip
    if added_bias(model) is not None:
        del clip.logit_bias
    return clip.eval()


def write_adapter(model: TrainableModel, base: str, folder: Path) -> None:
    """Write the PEFT adapter alone, with the trained projections.

    Raises:
        UsageError: the model has no adapter.
        OSError: the disk is full or cannot be written to.
    """
    if not has_adapter(model):
        raise UsageError(
            "this scenario trains no adapter", "export it with --format transformers instead"
        )
    with disk_errors():
        model.clip.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    # Changed only after saving, because PEFT finds the base model's files by this name
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = public_name(base)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_transformers(clip: Any, base: PretrainedModel, folder: Path) -> None:
    """Write weights, configuration, tokenizer and image processor of a merged model.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    with disk_errors():
        clip.save_pretrained(str(folder))
        write_processors(base, folder)


def write_processors(base: PretrainedModel, folder: Path) -> None:
    """Write the pretrained model's tokenizer and image processor."""
    for processor in _load_processors(base):
        processor.save_pretrained(str(folder))


def write_tokenizer(base: PretrainedModel, folder: Path) -> None:
    """Write the pretrained model's tokenizer."""
    tokenizer, _ = _load_processors(base)
    tokenizer.save_pretrained(str(folder))


def processor_of(base: PretrainedModel) -> Any:
    """Return the tokenizer and the image processor as one processor of transformers, such as
    ``CLIPProcessor``.

    Raises:
        ModelError: their files cannot be loaded.
    """
    import transformers

    tokenizer, image_processor = _load_processors(base)
    kind = getattr(transformers, base.architecture.processor_class)
    return kind(image_processor=image_processor, tokenizer=tokenizer)


def _load_processors(base: PretrainedModel) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor from their files, ready to be written.

    Texts are truncated to the model's context length. Settings that some tokenizers keep from
    loading or from their last use are removed.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    source = model_source(base.name)
    with loading_errors(base.name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    tokenizer.model_max_length = base.inputs.context_length
    if base.architecture.pads_texts:
        # The model was trained with padding on the right, unlike the default of Siglip2Tokenizer.
        # Only init_kwargs are written
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    if base.inputs.patches:
        image_processor.max_num_patches = base.inputs.patches.most
    elif side := base.sizes.image_size:
        square = {"height": side, "width": side}
        crops = "shortest_edge" in image_processor.size
        image_processor.size = {"shortest_edge": side} if crops else square
        if crops:
            image_processor.crop_size = square
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    loading = ("is_local", "local_files_only")
    for temporary in (*loading, "max_length", "stride", "truncation_strategy"):
        tokenizer.init_kwargs.pop(temporary, None)
    return tokenizer, image_processor


def write_sentence_transformers(clip: Any, base: PretrainedModel, folder: Path) -> None:
    """Write the folder of ``write_transformers``, and files for ``SentenceTransformer(folder)``.

    Its ``encode`` takes texts and images, and returns unit embeddings.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    write_transformers(clip, base, folder)
    transformer: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
            for kind in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    }
    if base.architecture.pads_texts:
        transformer["processing_kwargs"] = {
            "text": {
                "padding": "max_length",
                "max_length": base.inputs.context_length,
                "return_attention_mask": False,  # the tower was trained to attend to padding
            }
        }
    if patches := base.inputs.patches:  # Siglip2Processor does not read them from its files
        limits = {"patch_size": patches.size, "max_num_patches": patches.most}
        transformer["processing_kwargs"]["image"] = limits
    for name, content in {**_SENTENCE_FILES, "sentence_bert_config.json": transformer}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
