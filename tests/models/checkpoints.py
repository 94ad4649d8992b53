"""Small random checkpoints of real architectures, as folders that transformers wrote."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
    XLMRobertaTokenizer,
)

CHINESE_TEXTS = ["一把红色的椅子", "橡木桌 四个抽屉", "灯", "大房间里的蓝色沙发"]
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


def _towers(patch: int, size: int, act: str, text_act: str = "", **text: Any) -> dict[str, Any]:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": act,
    }
    return {
        "vision_config": {**small, "patch_size": patch, "image_size": size},
        "text_config": {**small, "hidden_act": text_act or act, **text},
    }


def write_clip(
    folder: Path, patch: int, size: int = 224, act: str = "quick_gelu", end: int = 49407
) -> Path:
    torch.manual_seed(0)
    clip_tokenizer().save_pretrained(str(folder))
    towers = _towers(patch, size, act, eos_token_id=end, vocab_size=49408)
    config = CLIPConfig(projection_dim=24, initializer_factor=5.0, **towers)
    CLIPModel(config).save_pretrained(str(folder))
    return _write_crop(folder, size)


def letters() -> list[str]:
    """Return every letter of the sample texts, and enough others for a vocabulary."""
    found = {letter for text in (*TEXTS, *CHINESE_TEXTS) for letter in text if letter != " "}
    return sorted(found | set(map(chr, range(33, 127))))


def xlm_roberta_tokenizer() -> XLMRobertaTokenizer:
    """Return a tokenizer of XLM-R's kind whose vocabulary is single letters."""
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [*special, ("▁", -2.0), *((letter, -3.0) for letter in letters()), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=pieces)


def bert_tokenizer() -> BertTokenizer:
    """Return a tokenizer of BERT's kind whose vocabulary is single letters."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters()]
    pieces += [f"##{letter}" for letter in letters()]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def write_metaclip_2(folder: Path, patch: int = 32, size: int = 64) -> Path:
    """Write a MetaCLIP 2, whose tokenizer is XLM-R's."""
    torch.manual_seed(0)
    tokenizer = xlm_roberta_tokenizer()
    tokenizer.save_pretrained(str(folder))
    towers = _towers(patch, size, "quick_gelu", eos_token_id=2, vocab_size=len(tokenizer))
    config = MetaClip2Config(projection_dim=24, initializer_factor=5.0, **towers)
    MetaClip2Model(config).save_pretrained(str(folder))
    return _write_crop(folder, size)


def write_chinese_clip(folder: Path, patch: int = 16, size: int = 64) -> Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(str(folder))
    text = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    towers = _towers(patch, size, "quick_gelu", text_act="gelu", **text)
    ChineseCLIPModel(ChineseCLIPConfig(projection_dim=24, **towers)).save_pretrained(str(folder))
    square = {"height": size, "width": size}
    crop = ChineseCLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    crop.save_pretrained(str(folder))
    return folder


def write_altclip(folder: Path, patch: int = 16, size: int = 64) -> Path:
    torch.manual_seed(0)
    tokenizer = xlm_roberta_tokenizer()
    tokenizer.save_pretrained(str(folder))
    text = {"vocab_size": len(tokenizer), "project_dim": 40, "initializer_range": 0.3}
    towers = _towers(patch, size, "quick_gelu", text_act="gelu", **text)
    AltCLIPModel(AltCLIPConfig(projection_dim=24, **towers)).save_pretrained(str(folder))
    return _write_crop(folder, size)


def _write_crop(folder: Path, size: int) -> Path:
    """Write CLIP's image processor, which crops."""
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


def siglip2_tokenizer() -> Siglip2Tokenizer:
    """Return a tokenizer of SigLIP 2's kind whose vocabulary is single letters."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters()]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Siglip2Tokenizer(vocab=vocabulary, merges=[])
    ends = TemplateProcessing(single="$A:0 <eos>:0", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = ends
    return tokenizer


def write_naflex(folder: Path, patch: int = 8, most: int = 24) -> Path:
    """Write a SigLIP 2 NaFlex, whose position embeddings are a grid of 4 x 4."""
    torch.manual_seed(0)
    tokenizer = siglip2_tokenizer()
    tokenizer.save_pretrained(str(folder))
    towers = _towers(patch, 0, "gelu_pytorch_tanh", vocab_size=len(tokenizer))
    towers["vision_config"] |= {"num_patches": 16}
    del towers["vision_config"]["image_size"]
    model = Siglip2Model(Siglip2Config(**towers))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(str(folder))
    processor = Siglip2ImageProcessor(patch_size=patch, max_num_patches=most)
    processor.save_pretrained(str(folder))
    return folder
