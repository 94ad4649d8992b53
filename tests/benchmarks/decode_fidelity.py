"""Measure how decoding JPEGs at a reduced scale changes pixels and image features.

Compares full and scaled decoding without augmentation, on photos in their own size and enlarged.
The features are from the packaged tiny model and from a ViT-B/32 with random weights (or from
``--model``).

    python tests/benchmarks/decode_fidelity.py --photos DIR [--quick] [--model NAME] [--json FILE]
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from side_by_side import arguments, write_figures
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clipft.data.images import decode
from clipft.data.images.augmentation import Transform
from clipft.data.images.decode import decode_image
from clipft.models.pretrained import load_pretrained

MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)


@dataclass(frozen=True)
class Fidelity:
    """The cosine between features, and the difference of pixels in steps of 1/255."""

    name: str
    least_cosine: float
    median_cosine: float
    mean_step: float
    most_step: float


def publish(rows: list[Fidelity], file: Path | None) -> None:
    """Print a table, and write the figures to ``file`` if it is given."""
    print(f"{'':48} {'cosine: least':>14} {'median':>10} {'pixels: mean':>13} {'most':>6}")
    for row in rows:
        cosines = f"{row.least_cosine:14.6f} {row.median_cosine:10.6f}"
        print(f"{row.name:48} {cosines} {row.mean_step:13.3f} {row.most_step:6.0f}")
    if file:
        write_figures(file, "decode fidelity", rows, ("torch", "transformers", "pillow"))


def jpegs(folder: Path, side: int, count: int) -> Iterator[bytes]:
    """Yield the photos of a folder as JPEGs of quality 90, resized to this shorter side."""
    for path in sorted(folder.rglob("*.jpg"))[:count]:
        with Image.open(path) as photo:
            photo = photo.convert("RGB")
            scale = side / min(photo.size)
            size = round(photo.width * scale), round(photo.height * scale)
            buffer = io.BytesIO()
            photo.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def pixels(pictures: list[bytes], size: int, margin: float) -> Tensor:
    """Decode to uint8 [N, 3, size, size]. A ``margin`` of 0 decodes at full scale."""
    decode._DRAFT_MARGIN = margin  # type: ignore[assignment]
    transform = Transform("none", size)
    at_least = size if margin else 0
    return torch.stack([transform(decode_image(data, at_least), 0) for data in pictures])


def encoders(name: str | None) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]:
    tiny = load_pretrained("tiny")
    torch.manual_seed(0)
    models = {"tiny": (tiny.model, tiny.inputs.image_size)}
    if name:
        base = load_pretrained(name)
        models[name] = (base.model, base.inputs.image_size)
    else:
        models["ViT-B/32, random"] = (CLIPModel(CLIPConfig()).eval(), 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    for label, (model, size) in models.items():

        def encode(batch: Tensor, model: CLIPModel = model) -> Tensor:
            found = []
            with torch.inference_mode():
                for part in batch.split(32):
                    inputs = (part / 255 - mean) / std
                    found.append(model.get_image_features(pixel_values=inputs).pooler_output)
            return torch.nn.functional.normalize(torch.cat(found), dim=-1)

        yield label, size, encode


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--model", help="measure this model's features as well")
    options = parser.parse_args()
    count, rows = (32 if options.quick else 228), []
    for side in (500, 800, 1200):
        pictures = list(jpegs(options.photos, side, count))
        for label, size, encode in encoders(options.model):
            whole = pixels(pictures, size, 0)
            features = encode(whole)
            for margin in (1, 2):
                scaled = pixels(pictures, size, margin)
                cosine = (encode(scaled) * features).sum(1)
                steps = (scaled.int() - whole.int()).abs().float()
                rows.append(
                    Fidelity(
                        f"{side} px, {label} at {size}, margin {margin:g}",
                        float(cosine.min()),
                        float(cosine.median()),
                        float(steps.mean()),
                        float(steps.max()),
                    )
                )
    publish(rows, options.json)


if __name__ == "__main__":
    main()
