"""Measure the gain of ``--context-length`` for captions that would otherwise be truncated.

Trains the packaged tiny model on the descriptions of a table of products, once with its own context
of 77 tokens and once with a longer one, on several splits by product. R@5 of both runs on the
validation pairs is compared for descriptions of more than 77 tokens, for shorter ones, and for the
name and the color instead. A text finds its image if any photo of its product is among the first
five, and an image finds its text if its own text is among them. The intervals are 95 % bootstrap
intervals of the paired difference, with products resampled.

    python tests/benchmarks/long_captions.py --table products.csv [--quick] [--json FILE]
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars
from peers import TINY
from side_by_side import arguments, clipft_json, write_figures
from transformers import AutoTokenizer

OWN, LONGER = 77, 248
DESCRIPTION, SHORT = "{description}", "{name}, {color}"
TABLES = ("images", "texts")
FIRST = 5
RESAMPLES = 4000


class Query(NamedTuple):
    """An image or a text of the validation pairs, and whether each run found its match.

    ``tokens`` is the number of tokens of its caption.
    """

    product: str
    tokens: int
    own: float
    longer: float


@dataclass(frozen=True)
class Result:
    """R@5 in percent with each context, the difference in points and its interval, and the
    percentage of queries whose caption is truncated with each context."""

    captions: str
    queries: int
    products: int
    cut_at_77: float
    cut_at_248: float
    r_at_5_with_77: float
    r_at_5_with_248: float
    difference: str


def train(data: Path, out: Path, context: int, seed: int, epochs: int) -> Path:
    settings = {
        "--model": "tiny",
        "--scenario": "full",
        "--data-dir": data,
        "--output-dir": out,
        "--caption": DESCRIPTION,
        "--context-length": context if context != OWN else 0,
        "--epochs": epochs,
        "--effective-batch-size": 64,
        "--lr": 5e-4,
        "--seed": seed,
        "--stop-on": "never",
        "--precision": "fp32",
        "--num-workers": 0,
        "--resamples": 0,
    }
    clipft_json("train", *(str(part) for pair in settings.items() for part in pair))
    return out / "full_checkpoint.pt"


def hits(checkpoint: Path, data: Path, caption: str) -> list[tuple[str, str, float]]:
    """Return the product and the caption of each text and each image, and whether it was found."""
    with tempfile.TemporaryDirectory() as made:
        clipft_json("embed", str(checkpoint), str(data), made, "--caption", caption)
        images, texts = (polars.read_parquet(f"{made}/{name}/*.parquet") for name in TABLES)
    texts = texts.unique(("product_id", "caption"), maintain_order=True)
    scores = texts["vector"].to_numpy() @ images["vector"].to_numpy().T
    of_product, of_caption = (
        texts[name].to_numpy()[:, None] == images[name].to_numpy()[None]
        for name in ("product_id", "caption")
    )
    found = []
    for queries, rows, own in ((texts, scores, of_product), (images, scores.T, of_caption.T)):
        first = np.argsort(-rows, axis=1, kind="stable")[:, :FIRST]
        hit = np.take_along_axis(own, first, axis=1).any(axis=1)
        found += zip(queries["product_id"], queries["caption"], hit.astype(float), strict=True)
    return found


def compared(name: str, queries: list[Query]) -> Result:
    products, numbers = np.unique([query.product for query in queries], return_inverse=True)
    tokens, own, longer = (np.array([query[column] for query in queries]) for column in (1, 2, 3))
    by_product = [np.bincount(numbers, weights) for weights in (None, 100 * (longer - own))]
    drawn = np.random.default_rng(0).integers(len(products), size=(RESAMPLES, len(products)))
    count, gained = (sums[drawn].sum(axis=1) for sums in by_product)
    low, high = np.percentile(gained / count, (2.5, 97.5))
    return Result(
        captions=name,
        queries=len(queries),
        products=len(products),
        cut_at_77=100 * float(np.mean(tokens > OWN)),
        cut_at_248=100 * float(np.mean(tokens > LONGER)),
        r_at_5_with_77=100 * float(own.mean()),
        r_at_5_with_248=100 * float(longer.mean()),
        difference=f"{100 * (longer - own).mean():+.1f} ({low:+.1f}..{high:+.1f})",
    )


def queries_of(split: int, table: Path, epochs: int) -> dict[str, list[Query]]:
    """Train on one split with both contexts, and return the queries by caption template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with tempfile.TemporaryDirectory() as made:
        data = Path(made) / "data"
        how = ("--group-field", "product_id", "--val-share", "0.4", "--seed", str(split))
        clipft_json("pack", str(table), str(data), "--caption", DESCRIPTION, *how)
        runs = [train(data, Path(made) / str(c), c, split, epochs) for c in (OWN, LONGER)]
        found = {}
        for caption in (DESCRIPTION, SHORT):
            both = [hits(run, data / "val", caption) for run in runs]
            found[caption] = [
                Query(product, len(tokenizer(text)["input_ids"]), own, longer)
                for (product, text, own), (_, _, longer) in zip(*both, strict=True)
            ]
    print(f"split {split} done", flush=True)
    return found


def measure(table: Path, splits: tuple[int, ...], epochs: int) -> list[Result]:
    found = [queries_of(split, table, epochs) for split in splits]
    descriptions, short = ([q for one in found for q in one[of]] for of in (DESCRIPTION, SHORT))
    groups = {
        "descriptions": descriptions,
        "descriptions past 77 tokens": [q for q in descriptions if q.tokens > OWN],
        "shorter descriptions": [q for q in descriptions if q.tokens <= OWN],
        "name and color": short,
    }
    return [compared(name, queries) for name, queries in groups.items()]


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--table", type=Path, required=True, help="table with products")
    return parser.parse_args()


def main() -> None:
    wish = chosen()
    rows = measure(wish.table, (1,) if wish.quick else (1, 2, 3), 2 if wish.quick else 10)
    for row in rows:
        print(row)
    if wish.json:
        write_figures(wish.json, "long captions", rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
