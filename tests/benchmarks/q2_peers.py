"""Fine-tune the packaged tiny model with a peer, for q2_quality.py.

Each peer trains LoRA (r = 16 on q and v of both encoders) and both projections in batches of 32
pairs, with its own defaults for schedule and decay. Images are resized once, before the first
epoch. The merged weights of the last epoch are written to OUT, for transformers.

    python tests/benchmarks/q2_peers.py PEER --data DIR --out OUT --epochs N --lr X --seed S
"""

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import webdataset
from peers import CPU, TINY, adapted, adapted_transformer, stacked, train_with_cached_loss
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, Trainer, TrainingArguments

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
BATCH = 32

Pair = tuple[Image.Image, str]


def training_pairs(data: Path) -> list[Pair]:
    shards = sorted(str(path) for path in (data / "train").glob("*.tar"))
    found = list[Pair]()
    for row in webdataset.WebDataset(shards, shardshuffle=False):
        image = next(value for key, value in row.items() if key in ("jpg", "jpeg", "png", "webp"))
        caption = row["txt"].decode() if "txt" in row else json.loads(row["json"])["caption"]
        found.append((Image.open(io.BytesIO(image)).convert("RGB"), caption))
    return found


def with_trainer(pairs: list[Pair], out: Path, how: dict[str, Any]) -> Any:
    """Train as in run_clip.py: with the model's own loss over each batch, without augmentation."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    processor = CLIPImageProcessor.from_pretrained(TINY)
    clip = CLIPModel.from_pretrained(TINY)
    length = clip.config.text_config.max_position_embeddings
    texts = tokenizer(
        [text for _, text in pairs],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    pixels = [processor(image, return_tensors="pt")["pixel_values"][0] for image, _ in pairs]
    items = [
        {
            "pixel_values": pixels[i],
            "input_ids": texts["input_ids"][i],
            "attention_mask": texts["attention_mask"][i],
        }
        for i in range(len(pairs))
    ]
    model = adapted(clip)
    settings = TrainingArguments(output_dir=str(out / "trainer"), **how, **CPU.trainer_arguments())
    Trainer(model=model, args=settings, train_dataset=items, data_collator=stacked).train()
    return model


def with_sentence_transformers(pairs: list[Pair], out: Path, how: dict[str, Any]) -> Any:
    """Train with its cached loss in both directions, with the temperature of the model."""
    processor = CLIPImageProcessor.from_pretrained(TINY)
    size = processor.crop_size["height"]
    images = [image.resize((size, size), Image.Resampling.BICUBIC) for image, _ in pairs]
    module = adapted_transformer(TINY)
    scale = CLIPModel.from_pretrained(TINY).logit_scale.exp().item()
    settings = {"output_dir": str(out / "trainer"), **how}
    train_with_cached_loss(
        module, images, [text for _, text in pairs], BATCH, settings, scale=scale
    )
    return module.model


PEERS: dict[str, Callable[[list[Pair], Path, dict[str, Any]], Any]] = {
    "transformers": with_trainer,
    "sentence-transformers": with_sentence_transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    wish = parser.parse_args()
    torch.manual_seed(wish.seed)
    how = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": wish.epochs,
        "learning_rate": wish.lr,
        "seed": wish.seed,
    }
    trained = PEERS[wish.peer](training_pairs(wish.data), wish.out, how)
    trained.merge_and_unload().save_pretrained(wish.out)
    for name in SIDE_FILES:
        shutil.copy(TINY / name, wish.out / name)
    shutil.rmtree(wish.out / "trainer", ignore_errors=True)


if __name__ == "__main__":
    main()
