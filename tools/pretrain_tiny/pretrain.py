"""Makes the packaged tiny CLIP from nothing: ``python -m tools.pretrain_tiny.pretrain``."""

import argparse
import logging
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tools.pretrain_tiny.scenes import render_scene
from tools.pretrain_tiny.vocabulary import VOCABULARY_SIZE, train_tokenizer

logger = logging.getLogger(__name__)

IMAGE_SIZE = 72
_CHUNK = 500
_CAPTIONS = 4
_LONGEST = 40
"""Tokens kept of a caption here: few are longer, and all of a batch pay for the longest."""
_BATCH = 128
_PEAK_RATE = 1.5e-3
_WARM_UP = 0.05
_HIGHEST_SCALE = math.log(100)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: pixels uint8 (n, 3, 72, 72), and some captions of each."""

    pixels: Tensor
    captions: list[tuple[str, ...]]


def render_scenes(count: int, seed: int, workers: int = 2) -> Scenes:
    """Render scenes 0..count in worker processes."""
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = [*pool.map(partial(_render_chunk, seed), starts)]
    pixels = torch.from_numpy(np.concatenate([chunk for chunk, _ in chunks]))
    captions = [texts for _, chunk in chunks for texts in chunk]
    return Scenes(pixels.permute(0, 3, 1, 2), captions)


def build_model(tokenizer: Any) -> CLIPModel:
    """A CLIP of 1.4 million random weights for that tokenizer."""
    tower = {"hidden_size": 128, "num_attention_heads": 4, "projection_dim": 128}
    text = tower | {
        "num_hidden_layers": 2,
        "intermediate_size": 384,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {
        "num_hidden_layers": 4,
        "intermediate_size": 384,
        "image_size": IMAGE_SIZE,
        "patch_size": 12,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def save_folder(model: CLIPModel, tokenizer: Any, folder: Path) -> None:
    """Write everything that ``from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(_MEAN),
        image_std=list(_STD),
    ).save_pretrained(folder)


def pretrain(
    model: CLIPModel, tokenizer: Any, scenes: Scenes, minutes: float, generator: torch.Generator
) -> None:
    """Contrastive learning until the time is over; the learning rate follows the clock."""
    tokens = _encode(tokenizer, scenes.captions)
    optimiser = torch.optim.AdamW(_weight_groups(model), lr=_PEAK_RATE, betas=(0.9, 0.98))
    began, step, mean_loss = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / (minutes * 60)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = _rate(done)
        loss = _step(model, optimiser, _draw_batch(scenes.pixels, tokens, generator))
        mean_loss = loss if step == 0 else 0.98 * mean_loss + 0.02 * loss
        step += 1
        if step % 100 == 0:
            logger.info("%4.0f %%  step %5d  loss %.3f", 100 * done, step, mean_loss)


def _render_chunk(seed: int, start: int) -> tuple[np.ndarray[Any, Any], list[tuple[str, ...]]]:
    scenes = [render_scene(seed, index, _CAPTIONS) for index in range(start, start + _CHUNK)]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pictures = [scene.image.resize(size, Image.Resampling.BICUBIC) for scene in scenes]
    return np.stack([np.asarray(picture) for picture in pictures]), [s.captions for s in scenes]


def _encode(tokenizer: Any, captions: list[tuple[str, ...]]) -> Tensor:
    """(n, captions, length) ids, int64."""
    flat = [caption for texts in captions for caption in texts]
    encoded = tokenizer(
        flat, padding="longest", truncation=True, max_length=_LONGEST, return_tensors="pt"
    )
    ids: Tensor = encoded["input_ids"]
    return ids.view(len(captions), _CAPTIONS, -1)


def _weight_groups(model: CLIPModel) -> list[dict[str, Any]]:
    """Decay matrices only: not norms, biases, nor the temperature."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def _rate(done: float) -> float:
    """Warm-up, then half a cosine, over the share of the time that is over."""
    if done < _WARM_UP:
        return _PEAK_RATE * done / _WARM_UP
    return _PEAK_RATE * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def _draw_batch(
    pixels: Tensor, tokens: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Normalised pictures, half of them mirrored and all shifted a little, and their ids."""
    chosen = torch.randint(len(pixels), (_BATCH,), generator=generator)
    picked = pixels[chosen].float() / 255
    picked = functional.pad(picked, (4, 4, 4, 4), mode="replicate")
    top, left = torch.randint(9, (2,), generator=generator).tolist()
    picked = picked[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    flip = torch.rand(_BATCH, 1, 1, 1, generator=generator) < 0.5
    picked = torch.where(flip, picked.flip(-1), picked)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    caption = torch.randint(_CAPTIONS, (_BATCH,), generator=generator)
    ids = tokens[chosen, caption]
    end = int(tokens.max())
    longest = int((ids == end).int().argmax(dim=1).max()) + 1
    return (picked - mean) / std, ids[:, :longest]


def _step(
    model: CLIPModel, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> float:
    pictures, ids = batch
    loss = model(pixel_values=pictures, input_ids=ids, return_loss=True).loss
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=_HIGHEST_SCALE)
    return float(loss.detach())


def main() -> None:
    """Render, train the tokenizer and the model, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    scenes = render_scenes(options.scenes, options.seed)
    logger.info("rendered %d scenes", len(scenes.captions))
    tokenizer = train_tokenizer(texts[0] for texts in scenes.captions)
    model = build_model(tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    pretrain(model, tokenizer, scenes, options.minutes, generator)
    save_folder(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
