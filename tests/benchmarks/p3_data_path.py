"""P3: samples per second of one process, from shards to a ready batch.

Compares clipft with (a) webdataset + Pillow + torchvision + CLIPProcessor as in transformers' CLIP
example, and (b) open_clip's transform and tokenizer in the pipeline of its trainer. All use the
same shards and one thread of the same process, with augmentation ``simple`` or the peer's own.

    python tests/benchmarks/p3_data_path.py [--quick] [--photos DIR] [--json FILE]
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from side_by_side import Work, arguments, compare, publish
from torchvision.transforms import v2
from transformers import CLIPImageProcessor

from clipft.data.captions.table import caption_table
from clipft.data.captions.template import CaptionTemplate
from clipft.data.captions.tokenizer import CaptionEncoder
from clipft.data.decoding import Preprocessing
from clipft.data.images.augmentation import Transform, resized
from clipft.data.images.decode import decode_image, resized_size
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.data.shards.folders import open_pairs
from clipft.models.pretrained import load_inputs

BATCH, SIDE = 64, 224
CAPTIONS = ("a grey oak side table", "velvet armchair with brass legs, emerald", "white shelf")


def photos(folder: Path | None, side: int, count: int) -> Iterator[bytes]:
    """Yield JPEGs of quality 90: the folder's photos at this size, or generated textures."""
    found = sorted(folder.rglob("*.jpg")) if folder else []
    for number in range(count):
        if found:
            with Image.open(found[number % len(found)]) as photo:
                image = photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        else:
            image = _textured(side, number)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def _textured(side: int, number: int) -> Image.Image:
    """Return noise of several scales, which compresses about as well as a photo."""
    draw, total = np.random.default_rng(number), np.zeros((side, side, 3), np.float32)
    for scale in (4, 16, 64, side // 2):
        noise = draw.integers(0, 256, (scale, scale, 3), np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((side, side)), np.float32)
    return Image.fromarray((total / 4).astype(np.uint8))


def write_shards(out: Path, pictures: Iterator[bytes]) -> None:
    out.mkdir(parents=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=256, verbose=0) as writer:
        for number, data in enumerate(pictures):
            caption = CAPTIONS[number % len(CAPTIONS)]
            writer.write({"__key__": f"{number:06d}", "jpg": data, "txt": caption})


def ours(folder: Path, tokenizer: Any) -> Work:
    dataset = open_pairs(folder)
    template, encoder = CaptionTemplate.parse("{caption}"), CaptionEncoder(tokenizer, 77)
    captions = caption_table(dataset, template, encoder, 1, lambda: None)
    preprocessing = Preprocessing(captions, SIDE, "simple", 1)
    plan = EpochPlan(len(dataset), BATCH, BATCH, 1)

    def work() -> int:
        steps = training_batches(dataset, preprocessing, plan, Position(), 1, LoaderOptions())
        return sum(step.pairs for step in steps)

    return work


def _stream(folder: Path, buffer: int) -> Any:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(buffer).decode("pilrgb")


def transformers_way(folder: Path, tokenizer: Any) -> Work:
    """Peer (a) augments PIL images; the processor resizes, crops and normalizes them."""
    augment = v2.Compose([v2.RandomResizedCrop(SIDE, scale=(0.8, 1.0)), v2.RandomHorizontalFlip()])
    processor = CLIPImageProcessor()

    def collate(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*samples, strict=True)
        pixels = processor(images=[augment(image) for image in images], return_tensors="pt")
        ids = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True)
        return pixels["pixel_values"], torch.tensor(ids["input_ids"])

    def work() -> int:
        samples = _stream(folder, 1000).to_tuple("jpg", "txt")
        return sum(len(p) for p, _ in samples.batched(BATCH, collation_fn=collate))

    return work


def open_clip_way(folder: Path) -> Work:
    """Peer (b) runs open_clip's training transform and tokenizer, sample by sample."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(SIDE, is_train=True, mean=mean, std=std)
    tokenize = open_clip.SimpleTokenizer(context_length=77)

    def work() -> int:
        samples = _stream(folder, 1000).rename(image="jpg", text="txt")
        samples = samples.map_dict(image=transform, text=lambda text: tokenize(text)[0])
        return sum(len(p) for p, _ in samples.to_tuple("image", "text").batched(BATCH))

    return work


def shares(folder: Path, tokenizer: Any) -> None:
    """Print where clipft spends its time, in milliseconds per sample."""
    dataset = open_pairs(folder)
    raw = [dataset[number] for number in range(min(256, len(dataset)))]
    transform = Transform("simple", SIDE)
    images = [decode_image(pair.image, SIDE) for pair in raw]
    parts: dict[str, Callable[[], Any]] = {
        "read": lambda: [dataset[number] for number in range(len(raw))],
        "decode": lambda: [decode_image(pair.image, SIDE) for pair in raw],
        "resize": lambda: [resized(image, resized_size(image.size, SIDE)) for image in images],
        "resize and augment": lambda: [transform(image, 1) for image in images],
        "tokenise": lambda: tokenizer([pair.caption.decode() for pair in raw]),
    }
    print(f"\n{folder.parent.name}, ms per sample:", end="")
    for name, part in parts.items():
        part()
        started = time.perf_counter()
        part()
        print(f"  {name} {(time.perf_counter() - started) / len(raw) * 1e3:.3f}", end="")
    print()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of .jpg files to make the shards of")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, rows = load_inputs("tiny").tokenizer, []
    pairs, count = (2, 128) if chosen.quick else (5, 768)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for side, samples, goal in ((500, count, 2.0), (1200, count // 2, 2.5)):
            raw = root / str(side) / "train"
            write_shards(raw, photos(chosen.photos, side, samples))
            mine, peer = ours(raw, tokenizer), transformers_way(raw, tokenizer)
            name = f"raw {side}x{side}"
            rows.append(compare(f"{name}, transformers' way", mine, peer, goal, pairs))
            rows.append(compare(f"{name}, open_clip", mine, open_clip_way(raw), 0, pairs))
        files = root / "files"
        files.mkdir()
        for number, data in enumerate(photos(chosen.photos, 1200, count // 2)):
            (files / f"{number}.jpg").write_bytes(data)
            (files / f"{number}.txt").write_text(f"{CAPTIONS[number % 3]} {number}")
        options = PackOptions(val_share=0, size=256, processes=1)
        pack(files, root / "256", options, lambda done, total: None)
        packed, name = root / "256" / "train", "packed --size 256"
        mine, raw = ours(packed, tokenizer), root / "1200" / "train"
        peer = transformers_way(raw, tokenizer)
        rows.append(compare(f"{name}, transformers' on raw 1200", mine, peer, 6, pairs))
        peer = transformers_way(packed, tokenizer)
        rows.append(compare(f"{name}, transformers' way", mine, peer, 0, pairs))
        rows.append(compare(f"{name}, open_clip", mine, open_clip_way(packed), 0, pairs))
        packages = (
            "torch",
            "torchvision",
            "transformers",
            "webdataset",
            "open_clip_torch",
            "pillow",
        )
        publish("P3", rows, packages, chosen.json)
        for folder in (root / "500" / "train", raw, packed):
            shares(folder, tokenizer)


if __name__ == "__main__":
    main()
