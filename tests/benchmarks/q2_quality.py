"""Q2: retrieval after the same number of epochs from the same weights.

Compares clipft with transformers' Trainer with PEFT, and with sentence-transformers and its cached
loss (scale 100, both directions). All of them train the same parts of the packaged tiny model (LoRA
r = 16 on q and v of both encoders, both projections in full) with one learning rate, and keep their
own defaults for schedule, augmentation and decay. clipft measures the weights of the last epoch of
each on the validation pairs. DIR holds train/ and val/ with NAME.jpg and NAME.txt.

    python tests/benchmarks/q2_quality.py --photos DIR [--quick] [--json FILE]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import CPU, adapted, adapted_transformer, stacked, train_with_cached_loss
from PIL import Image
from side_by_side import arguments, write_figures
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, Trainer, TrainingArguments

import clipft.models

TINY = Path(clipft.models.__file__).parent / "tiny"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Work:
    """An optimizer step uses ``batch`` pairs, ``micro`` at a time."""

    name: str
    batch: int
    micro: int
    epochs: int
    lr: float


WORKS = (
    Work("128 pairs as 4 x 32, 10 epochs", 128, 32, 10, 2e-3),
    Work("32 pairs at once, 5 epochs", 32, 32, 5, 1e-3),
)
QUICK = (Work("128 pairs as 4 x 32, 1 epoch", 128, 32, 1, 2e-3),)


@dataclass(frozen=True)
class Result:
    """R@10 on the validation pairs in percent; ``met`` if clipft is at least as good as both."""

    work: str
    seed: int
    direction: str
    untouched: float
    ours: float
    transformers: float
    sentence_transformers: float
    met: str


@dataclass(frozen=True)
class Place:
    """``photos`` are the files, ``data`` the same as shards, and ``out`` receives the results."""

    photos: Path
    data: Path
    out: Path


def clipft_json(*arguments: str) -> Any:
    command = [sys.executable, "-m", "clipft", *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def recall(found: Any) -> dict[str, float]:
    return {d: 100 * found[d]["r@10"] for d in ("text_to_image", "image_to_text")}


def ours(work: Work, seed: int, place: Place) -> dict[str, float]:
    out = place.out / "ours"
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "--model": "tiny",
        "--scenario": "dual_lora",
        "--data-dir": place.data,
        "--output-dir": out,
        "--epochs": work.epochs,
        "--effective-batch-size": work.batch,
        "--micro-batch-size": work.micro,
        "--lr": work.lr,
        "--seed": seed,
        "--stop-on": "never",
        "--precision": "fp32",
        "--num-workers": 0,
    }
    clipft_json("train", *(str(part) for pair in settings.items() for part in pair))
    last = str(out / "dual_lora_checkpoint.pt")
    return recall(clipft_json("evaluate", last, "--data-dir", str(place.data), "--resamples", "0"))


def measured(model: str, place: Place) -> dict[str, float]:
    plain = ("--resamples", "0", "--num-workers", "0")
    return recall(clipft_json("zero-shot", "--model", model, "--data-dir", str(place.data), *plain))


def merged(adapted: Any, place: Place) -> dict[str, float]:
    """The figures of a peer's weights in a transformers folder."""
    folder = place.out / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    adapted.merge_and_unload().save_pretrained(folder)
    for name in SIDE_FILES:
        shutil.copy(TINY / name, folder / name)
    return measured(str(folder), place)


def captioned(place: Place) -> list[tuple[Path, str]]:
    photos = sorted((place.photos / "train").glob("*.jpg"))
    return [(photo, photo.with_suffix(".txt").read_text(encoding="utf-8")) for photo in photos]


def transformers_way(work: Work, seed: int, place: Place) -> dict[str, float]:
    """As in run_clip.py: the model's own loss over each micro-batch."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    processor = CLIPImageProcessor.from_pretrained(TINY)
    pairs = captioned(place)
    with torch.no_grad():
        pixels = torch.cat(
            [
                processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
                for path, _ in pairs
            ]
        )
    clip = CLIPModel.from_pretrained(TINY)
    length = clip.config.text_config.max_position_embeddings
    padding = {"padding": "max_length", "truncation": True, "max_length": length}
    texts = tokenizer([text for _, text in pairs], return_tensors="pt", **padding)
    items = [
        {
            "pixel_values": pixels[i],
            "input_ids": texts["input_ids"][i],
            "attention_mask": texts["attention_mask"][i],
        }
        for i in range(len(pairs))
    ]

    model = adapted(clip)
    how = TrainingArguments(
        output_dir=str(place.out / "trainer"),
        per_device_train_batch_size=work.micro,
        gradient_accumulation_steps=work.batch // work.micro,
        num_train_epochs=work.epochs,
        learning_rate=work.lr,
        seed=seed,
        **CPU.trainer_arguments(),
    )
    Trainer(model=model, args=how, train_dataset=items, data_collator=stacked).train()
    return merged(model, place)


def sentence_transformers_way(work: Work, seed: int, place: Place) -> dict[str, float]:
    torch.manual_seed(seed)
    module, pairs = adapted_transformer(TINY), captioned(place)
    how = {
        "output_dir": str(place.out / "trainer"),
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": work.epochs,
        "learning_rate": work.lr,
        "seed": seed,
    }
    images, texts = [str(path) for path, _ in pairs], [text for _, text in pairs]
    train_with_cached_loss(module, images, texts, work.micro, how)
    return merged(module.model, place)


Way = Callable[[Work, int, Place], dict[str, float]]


def results(work: Work, seed: int, place: Place, untouched: dict[str, float]) -> list[Result]:
    ways: tuple[Way, ...] = (ours, transformers_way, sentence_transformers_way)
    found = [way(work, seed, place) for way in ways]
    return [
        Result(
            work.name,
            seed,
            direction.replace("_", " "),
            untouched[direction],
            *(way[direction] for way in found),
            "yes" if found[0][direction] >= max(way[direction] for way in found) else "no",
        )
        for direction in untouched
    ]


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and val/")
    return parser.parse_args()


def main() -> None:
    wish, rows = chosen(), list[Result]()
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        clipft_json("pack", str(wish.photos), str(out / "data"))
        place = Place(wish.photos, out / "data", out)
        untouched = measured("tiny", place)
        for work in QUICK if wish.quick else WORKS:
            for seed in (1,) if wish.quick else (1, 2, 3):
                rows += results(work, seed, place, untouched)
                for row in rows[-2:]:
                    print(row, flush=True)
    if wish.json:
        packages = ("torch", "transformers", "peft", "sentence-transformers")
        write_figures(wish.json, "Q2", rows, packages)


if __name__ == "__main__":
    main()
