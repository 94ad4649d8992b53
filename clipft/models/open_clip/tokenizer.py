"""Loads the tokenizer of an open_clip model as a tokenizer of transformers."""

from collections.abc import Mapping
from typing import Any

from clipft.core.errors import ModelError, first_line
from clipft.models.open_clip.sources import Source, open_clip_installed

_CLIP_ON_HUB = "openai/clip-vit-base-patch32"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
"""Python's ``string.punctuation`` as a regular expression."""
_CLEANING = ("clean",)


def load_tokenizer(source: Source, text: Mapping[str, Any]) -> Any:
    """Load the tokenizer that the ``text_cfg`` of a model asks for.

    Raises:
        ModelError: it cannot be loaded, or transformers has no equivalent.
    """
    options = dict(text.get("tokenizer_kwargs") or {})
    odd = sorted(name for name, value in options.items() if name not in _CLEANING and value)
    if text.get("tokenizer_mode") or odd:
        odd_name = text.get("tokenizer_mode") or odd[0]
        raise ModelError(
            f"cannot use {source.name}: transformers has no tokenizer with {odd_name}",
            "choose another model",
        )
    tokenizer = _of_transformers(source) if source.tokenizer else _of_clip(source)
    if options.get("clean") == "canonicalize":
        _remove_punctuation(tokenizer)
    tokenizer.model_max_length = int(text.get("context_length", 77))
    return tokenizer


def _of_transformers(source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    except Exception as error:  # of many types
        raise ModelError(
            f"cannot load the tokenizer of {source.name} from {source.tokenizer}: "
            f"{first_line(error)}",
            "put its tokenizer's files beside the weights, or check the network",
        ) from error


def _of_clip(source: Source) -> Any:
    """Build CLIP's tokenizer from the vocabulary in open_clip. If open_clip is not installed, load
    the tokenizer from the hub."""
    if open_clip_installed():
        from open_clip.tokenizer import SimpleTokenizer
        from transformers import CLIPTokenizer

        bpe = SimpleTokenizer()
        names = {"<start_of_text>": _START, "<end_of_text>": _END}
        vocabulary = {names.get(token, token): number for token, number in bpe.encoder.items()}
        return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_CLIP_ON_HUB)
    except Exception as error:  # of many types
        raise ModelError(
            f"cannot get CLIP's tokenizer for {source.name}: open_clip is not installed, and "
            f"{_CLIP_ON_HUB} cannot be loaded",
            "pip install 'clipft[open_clip]', or check the network",
        ) from error


def _remove_punctuation(tokenizer: Any) -> None:
    """Make a tokenizer lower its input and remove ASCII punctuation, as in SigLIP's training."""
    from tokenizers import Regex, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # SiglipTokenizer of transformers already does this
        return
    cleaning = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(_PUNCTUATION), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    before = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([*cleaning, *before])
