"""What ``--context-length`` gives for captions that the model would otherwise cut.

Trains the packaged tiny model on a table of products with its own context of 77 tokens and with a
longer one, on several splits by product, and compares R@5 of both runs on the validation pairs:
with the descriptions that they were trained on ("long"), and with name and color in their place
("short"). A text finds its image if any
photo of its product is among the first five, and an image its text if its own description is. The
intervals are those of the paired difference, with products drawn anew (bootstrap, 95 %).

    python tests/benchmarks/long_captions.py --table products.csv [--quick] [--json FILE]
"""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars
from q2_quality import TINY, clipft_json
from side_by_side import arguments, write_figures
from transformers import AutoTokenizer

OWN, LONGER = 77, 248
CAPTIONS = {"long": "{description}", "short": "{name}, {color}"}
FIRST = 5
DRAWS = 4000


@dataclass(frozen=True)
class Result:
    """R@5 in percent with each context, the difference in points and its interval."""

    captions: str
    queries: int
    products: int
    cut_before: float
    cut_after: float
    own: float
    longer: float
    difference: float
    low: float
    high: float


def train(data: Path, out: Path, context: int, seed: int, epochs: int) -> Path:
    settings = {
        "--model": "tiny",
        "--scenario": "full",
        "--data-dir": data,
        "--output-dir": out,
        "--caption": CAPTIONS["long"],
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


def hits(checkpoint: Path, data: Path, out: Path) -> dict[tuple[str, str], list[float]]:
    """For each product of the validation pairs and its description, whether each query found."""
    clipft_json("embed", str(checkpoint), str(data / "val"), str(out), "--caption", "{description}")
    tables = [polars.read_parquet(out / name / "*.parquet") for name in ("images", "texts")]
    images, texts = tables[0], tables[1].unique("caption", maintain_order=True)
    scores = texts["vector"].to_numpy() @ images["vector"].to_numpy().T
    own = texts["caption"].to_numpy()[:, None] == images["caption"].to_numpy()[None]
    found = defaultdict(list)
    for product, caption, row, mine in zip(
        texts["product_id"], texts["caption"], scores, own, strict=True
    ):
        best = np.argsort(-row, kind="stable")[:FIRST]
        found[product, caption].append(float(mine[best].any()))
    for product, caption, column, mine in zip(
        images["product_id"], images["caption"], scores.T, own.T, strict=True
    ):
        best = np.argsort(-column, kind="stable")[:FIRST]
        found[product, caption].append(float(mine[best].any()))
    return found


def compared(name: str, pairs: list[tuple[str, int, float, float]]) -> Result:
    """``pairs`` has for each query its product, its tokens, and both results."""
    products = sorted({product for product, *_ in pairs})
    number = {product: row for row, product in enumerate(products)}
    sums = np.zeros((len(products), 3))  # queries, found with the own context, with the longer
    for product, _, own, longer in pairs:
        sums[number[product]] += (1, own, longer)
    drawn = np.random.default_rng(0).integers(len(products), size=(DRAWS, len(products)))
    totals = sums[drawn].sum(1)
    low, high = np.percentile(100 * (totals[:, 2] - totals[:, 1]) / totals[:, 0], (2.5, 97.5))
    queries, own, longer = sums.sum(0)
    lengths = np.array([tokens for _, tokens, *_ in pairs])
    return Result(
        name,
        len(pairs),
        len(products),
        100 * float(np.mean(lengths > OWN)),
        100 * float(np.mean(lengths > LONGER)),
        float(100 * own / queries),
        float(100 * longer / queries),
        float(100 * (longer - own) / queries),
        float(low),
        float(high),
    )


def measure(table: Path, seeds: tuple[int, ...], epochs: int) -> list[Result]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pairs: dict[str, list[tuple[str, int, float, float]]] = {name: [] for name in CAPTIONS}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as made:
            data = Path(made) / "data"
            how = ("--group-field", "product_id", "--val-share", "0.4", "--seed", str(seed))
            clipft_json("pack", str(table), str(data), "--caption", CAPTIONS["long"], *how)
            runs = [train(data, Path(made) / str(c), c, seed, epochs) for c in (OWN, LONGER)]
            for name, caption in CAPTIONS.items():
                own, longer = (hits(run, data, run.parent / name, caption) for run in runs)
                for (product, text), found in own.items():
                    tokens = len(tokenizer(text)["input_ids"])
                    both = zip(found, longer[product, text], strict=True)
                    pairs[name] += [(product, tokens, *each) for each in both]
        print(f"split {seed} done", flush=True)
    return [compared(name, found) for name, found in pairs.items()]


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
