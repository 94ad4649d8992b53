"""Small random checkpoints of open_clip's own, as it writes them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clipft.models.open_clip.names import CONFIG_FILE

WORDS = [
    "a",
    "an",
    "the",
    "photo",
    "of",
    "two",
    "red",
    "blue",
    "chair",
    "chairs",
    "table",
    "oak",
    "lamp",
    "sofa",
    "room",
]
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 64,
        "layers": 2,
        "width": 64,
        "head_width": 16,
        "patch_size": 16,
        "mlp_ratio": 2.71,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def changed(vision: Any = None, text: Any = None, **top: Any) -> dict[str, Any]:
    """Return ``CONFIG`` with some settings of the towers, or of the whole, replaced."""
    return {
        **CONFIG,
        **top,
        "vision_cfg": {**CONFIG["vision_cfg"], **(vision or {})},
        "text_cfg": {**CONFIG["text_cfg"], **(text or {})},
    }


def make(config: dict[str, Any]) -> Any:
    """Make open_clip's model with weights that show in the embeddings."""
    torch.manual_seed(0)
    settings = {name: value for name, value in config.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = kind(**settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "logit" not in name:
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def write(
    folder: Path, config: dict[str, Any] = CONFIG, preprocess: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(make(config).state_dict(), folder / "open_clip_pytorch_model.bin")
    describe(folder, config, preprocess)
    return folder


def describe(
    folder: Path, config: dict[str, Any], preprocess: dict[str, Any] | None = None
) -> None:
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / CONFIG_FILE).write_text(json.dumps(content))


def write_word_tokenizer(folder: Path, end: int, size: int = 64) -> Path:
    """Write a tokenizer of whole words whose end token has the id ``end``, as those of other
    languages have it among their first ids."""
    special = ["<unk>", "</s>", "<pad>", "<s>"]
    special[1], special[end] = special[end], special[1]
    fill = [f"word{number}" for number in range(size - len(special) - len(WORDS))]
    tokens = [*special, *WORDS, *fill]
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(token, tokens.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        bos_token="<s>",
    )
    tokenizer.save_pretrained(str(folder))
    return folder
