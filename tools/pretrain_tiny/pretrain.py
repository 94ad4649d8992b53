"""Make the packaged tiny CLIP from nothing: ``python -m tools.pretrain_tiny.pretrain``."""

import argparse
import json
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
"""Tokens kept of a caption: few are longer, and the longest sets the cost of a whole batch."""
_BATCH = 128
_PEAK_RATE = 1.5e-3
_WARM_UP = 0.05
LEARNING_RATES = dict.fromkeys(
    ("linear_probe", "dual_lora", "vision_lora", "text_lora", "full"), 1e-3
)
"""What suits this model in fine-tuning: it is small, and was trained at a high rate itself."""
_HIGHEST_SCALE = math.log(100)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: pixels [n, 3, 72, 72] uint8, and ``_CAPTIONS`` captions of each."""

    pixels: Tensor
    captions: list[tuple[str, ...]]


def render_scenes(count: int, seed: int, workers: int = 2) -> Scenes:
    """Render scenes in worker processes: ``count``, rounded up to a multiple of 500."""
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = [*pool.map(partial(_render_chunk, seed), starts)]
    pixels = torch.from_numpy(np.concatenate([chunk for chunk, _ in chunks]))
    captions = [texts for _, chunk in chunks for texts in chunk]
    return Scenes(pixels.permute(0, 3, 1, 2), captions)


def build_model(tokenizer: Any) -> CLIPModel:
    """Make a CLIP of 1.4 million random weights for ``tokenizer``."""
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
    """Write all files that ``from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(_MEAN),
        image_std=list(_STD),
    ).save_pretrained(folder)
    rates = json.dumps({"learning_rates": LEARNING_RATES}, indent=2)
    (folder / "clipft.json").write_text(rates + "\n", encoding="utf-8")


def pretrain(
    model: CLIPModel, tokenizer: Any, scenes: Scenes, minutes: float, generator: torch.Generator
) -> None:
    """Train contrastively for that many minutes; the learning rate follows the clock.

    It warms up over the first 5% of the time and then falls along half a cosine.
    """
    flat = [caption for texts in scenes.captions for caption in texts]
    encoded = tokenizer(
        flat, padding="longest", truncation=True, max_length=_LONGEST, return_tensors="pt"
    )
    tokens = encoded["input_ids"].view(len(scenes.captions), _CAPTIONS, -1)
    # Weight decay for matrices only: not for norms, biases or the temperature
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=_PEAK_RATE,
        betas=(0.9, 0.98),
    )
    began, step, mean_loss = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / (minutes * 60)) < 1:
        if done < _WARM_UP:
            rate = _PEAK_RATE * done / _WARM_UP
        else:
            rate = _PEAK_RATE * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, ids = _draw_batch(scenes.pixels, tokens, generator)
        output = model(pixel_values=images, input_ids=ids, return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=_HIGHEST_SCALE)
        loss = float(output.loss.detach())
        mean_loss = loss if step == 0 else 0.98 * mean_loss + 0.02 * loss
        step += 1
        if step % 100 == 0:
            logger.info("%4.0f %%  step %5d  loss %.3f", 100 * done, step, mean_loss)


def _render_chunk(seed: int, start: int) -> tuple[np.ndarray[Any, Any], list[tuple[str, ...]]]:
    scenes = [render_scene(seed, index, _CAPTIONS) for index in range(start, start + _CHUNK)]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = [scene.image.resize(size, Image.Resampling.BICUBIC) for scene in scenes]
    return np.stack([np.asarray(image) for image in images]), [s.captions for s in scenes]


def _draw_batch(
    pixels: Tensor, tokens: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw normalized images, half of them mirrored and all shifted a little, and their ids."""
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
    end = int(tokens.max())  # the highest id ends every text, and also pads it
    longest = int((ids == end).int().argmax(dim=1).max()) + 1
    return (picked - mean) / std, ids[:, :longest]


def main() -> None:
    """Render scenes, train the tokenizer and the model, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long to train")
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
