"""Small random checkpoints of real architectures, as folders that transformers wrote."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
    XLMRobertaTokenizer,
)

TEXTS = ["a red chair", "An oak table, with 4 drawers!", "lamp", "a blue sofa in a large room"]


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return the real tokenizer of CLIP, from the vocabulary that open_clip carries."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in bpe.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks))


def siglip_tokenizer(folder: Path, texts: Iterable[str]) -> SiglipTokenizer:
    """Return a tokenizer of SigLIP's kind whose vocabulary was learned from ``texts``."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        control_symbols=["<pad>"],
        minloglevel=2,
    )
    return SiglipTokenizer(str(folder / "spiece.model"))


def _towers(patch: int, size: int, act: str, **text: Any) -> dict[str, Any]:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": act,
    }
    return {
        "vision_config": {**small, "patch_size": patch, "image_size": size},
        "text_config": {**small, **text},
    }


def write_clip(
    folder: Path, patch: int, size: int = 224, act: str = "quick_gelu", end: int = 49407
) -> Path:
    torch.manual_seed(0)
    clip_tokenizer().save_pretrained(str(folder))
    towers = _towers(patch, size, act, eos_token_id=end, vocab_size=49408)
    config = CLIPConfig(projection_dim=24, initializer_factor=5.0, **towers)
    CLIPModel(config).save_pretrained(str(folder))
    square = {"height": size, "width": size}
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square).save_pretrained(str(folder))
    return folder


def write_metaclip_2(folder: Path, patch: int = 32, size: int = 64) -> Path:
    """Write a MetaCLIP 2, whose tokenizer is XLM-R's; its vocabulary here is single letters."""
    torch.manual_seed(0)
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [*special, ("▁", -2.0), *((letter, -3.0) for letter in letters), ("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=pieces)
    tokenizer.save_pretrained(str(folder))
    towers = _towers(patch, size, "quick_gelu", eos_token_id=2, vocab_size=len(tokenizer))
    config = MetaClip2Config(projection_dim=24, initializer_factor=5.0, **towers)
    MetaClip2Model(config).save_pretrained(str(folder))
    square = {"height": size, "width": size}
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square).save_pretrained(str(folder))
    return folder


def write_siglip(folder: Path, patch: int = 16, size: int = 64) -> Path:
    torch.manual_seed(0)
    tokenizer = siglip_tokenizer(folder, TEXTS * 10)
    tokenizer.save_pretrained(str(folder))
    towers = _towers(patch, size, "gelu_pytorch_tanh", vocab_size=len(tokenizer))
    model = SiglipModel(SiglipConfig(**towers))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(str(folder))
    square = {"height": size, "width": size}
    SiglipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        str(folder)
    )
    return folder
