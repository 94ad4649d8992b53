"""Q6: photos of a product, several fields, and labels, on real catalogues.

Garments: does ``--photo-pairs`` find another photo of the same product more often, and at what cost
from text to image; and what do ``--fields`` gain and cost beside name and color alone? Groceries:
the accuracy of training on labels, beside the same prompts, a linear classifier and Tip-Adapter on
the pretrained model. All start from the packaged tiny model and are measured on a test split that
chose nothing, over three seeds. Intervals are those of the bootstrap over products, or images, with
the same resamples for both sides.

GARMENTS holds products.csv (image, product_id, name, color, material, description), and GROCERIES
train/ and val/ with a metadata.csv (file_name, label).

Run the same command again to continue: what is finished in --out is not repeated.

    python tests/benchmarks/q6_products.py --garments DIR --groceries DIR --out DIR [--json FILE]
"""

import csv
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import arguments, write_figures

from clipft.config.sources import load_settings
from clipft.embedding.load import load_model
from clipft.evaluation.evaluator import EvaluationSet, compare
from clipft.metrics.bootstrap import interval
from clipft.metrics.retrieval import Evaluation, Part
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.load import load_fine_tuned
from clipft.runs.places import saved_settings

PLAIN = ("--caption", "{name}, {color}")
GARMENTS = {
    "name and color": PLAIN,
    "photo pairs 0.3": (*PLAIN, "--photo-pairs", "0.3"),
    "fields": ("--fields", "name:1,description:0.5,material:0.2"),
}
LABELS = {
    "all images": ("--epochs", "12", "--lr", "4e-3"),
    "4 shots": ("--shots", "4", "--epochs", "40", "--lr", "4e-3"),
}
"""The text encoder of the tiny model has never met these labels, which takes a higher rate."""
QUERIES = ("{name}, {color}", "{name}", "{description}")
COMPARED = (
    ("name and color", "pretrained", QUERIES[:1]),
    ("photo pairs 0.3", "pretrained", QUERIES[:1]),
    ("photo pairs 0.3", "name and color", QUERIES[:1]),
    ("fields", "name and color", QUERIES),
)
FIGURES = (
    ("photos", "image_to_image", "hit@1"),
    ("photos", "image_to_image", "map"),
    ("grouped", "text_to_image", "hit@1"),
    ("grouped", "text_to_image", "map"),
    ("paired", "text_to_image", "r@10"),
)
SMALL_FILES = ("--size", "128")
RECIPE = {"model": "tiny", "precision": "fp32", "num_workers": 0, "effective_batch_size": 32}
"""All else is a default, the learning rate that of the tiny model."""


@dataclass(frozen=True)
class Row:
    """A figure of two sides in percent, and their difference in points with its interval."""

    data: str
    variant: str
    figure: str
    other: str
    theirs: float
    ours: float
    difference: float
    low: float
    high: float


def clipft(*arguments: object) -> None:
    command = [sys.executable, "-m", "clipft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def train(data: Path, out: Path, options: Sequence[str], seed: int) -> Path:
    """Train, unless that is done already, and return the run folder."""
    recipe = {**RECIPE, "seed": seed}
    if (out / "dual_lora" / "result.json").exists():
        return out / "dual_lora"
    given = [str(part) for name, value in recipe.items() for part in (option(name), value)]
    clipft("train", "--data-dir", data, "--output-dir", out, *given, *options)
    return out / "dual_lora"


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measured(run: Path, data: Path, caption: str, pretrained: bool = False) -> Evaluation:
    """Evaluate the best epoch of a run, or the model that it began with, on the test pairs, with
    these captions as queries."""
    content = load_checkpoint(run / "best.pt")
    given = {"data_dir": str(data), "caption": caption, "group_field": "product_id"}
    now = load_settings(given, environ={})
    settings = saved_settings(content, now, tuple(given))
    chosen = load_fine_tuned(content, settings)
    if pretrained:
        chosen = load_model(settings, pretrained=True)
    pairs = EvaluationSet.open(chosen.base.inputs, settings, "test")
    return pairs.evaluate(chosen).evaluation


Figure = tuple[str, str, str]
"""Protocol, direction and name of a figure."""


def mean_of(parts: Sequence[Part], name: str) -> tuple[float, Any]:
    """The mean over seeds, of the figure and of each resample."""
    values = np.mean([part.resampled[name] for part in parts], axis=0)
    return float(np.mean([part.means[name] for part in parts])), values


def compared(
    data: str, variant: str, other: str, figure: Figure, ours: list[Part], theirs: list[Part]
) -> Row:
    name = figure[2]
    (value, resampled), (base, base_resampled) = mean_of(ours, name), mean_of(theirs, name)
    around = interval(resampled - base_resampled)
    numbers = (base, value, value - base, around["low"], around["high"])
    return Row(data, variant, " ".join(figure), other, *(round(100 * n, 1) for n in numbers))


def garments(source: Path, place: Path, seeds: int, quick: bool) -> Iterator[Row]:
    data = place / "garments"
    split = ("--group-field", "product_id", "--val-share", "0.2", "--test-share", "0.3")
    split += SMALL_FILES
    if not data.exists():
        clipft("pack", source / "products.csv", data, "--caption", "{name}, {color}", *split)
    epochs = ("--epochs", "2" if quick else "20")
    found: dict[str, dict[str, list[Evaluation]]] = {}
    for variant, options in GARMENTS.items():
        queries: dict[str, list[Evaluation]] = {query: [] for query in QUERIES}
        for seed in range(1, seeds + 1):
            out = place / f"{variant}-{seed}"
            run = train(data, out, (*options, "--group-field", "product_id", *epochs), seed)
            for query in QUERIES:
                queries[query].append(measured(run, data, query))
        found[variant] = queries
    begun = place / "name and color-1" / "dual_lora"
    found["pretrained"] = {query: [measured(begun, data, query, True)] for query in QUERIES}
    for variant, other, queries_of in COMPARED:
        for query, figure in product(queries_of, FIGURES):
            ours, theirs = (
                [evaluation.parts[figure[0]][figure[1]] for evaluation in found[name][query]]
                for name in (variant, other)
            )
            row = compared(f"garments, {query}", variant, other, figure, ours, theirs)
            print(row, flush=True)
            yield row


def groceries(source: Path, place: Path, seeds: int, quick: bool) -> Iterator[Row]:
    raw, data = place / "groceries-raw", place / "groceries"
    if not data.exists():
        write_splits(source, raw)
        clipft("pack", raw, data, *SMALL_FILES)
    fewer = ("--epochs", "2") if quick else ()
    labeled = ("--label-field", "label", "--label-prompts", "general")
    for variant, options in LABELS.items():
        runs = []
        for seed in range(1, seeds + 1):
            out = place / f"labels-{variant}-{seed}"
            run = train(data, out, (*labeled, *options, *fewer), seed)
            runs.append(accuracies(run, data))
        for other in ("zero_shot", "linear", "tip_adapter"):
            ours, theirs = [r["after"] for r in runs], [r[other] for r in runs]
            figure = ("classification", "prompts", "top1")
            row = compared("groceries", variant, other, figure, ours, theirs)
            print(row, flush=True)
            yield row


def write_splits(source: Path, raw: Path) -> None:
    """Copy the photos into three splits, each with all labels: every fifth training photo of a
    label is for validation. Left to itself, ``pack`` keeps the photos of a label in one split,
    because they share their caption."""
    seen = Counter[str]()
    for folder in ("train", "val"):
        with (source / folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        splits: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            seen[row["label"]] += 1
            held_out = "val" if seen[row["label"]] % 5 == 0 else "train"
            splits.setdefault("test" if folder == "val" else held_out, []).append(row)
        for split, chosen in splits.items():
            (raw / split).mkdir(parents=True, exist_ok=True)
            for row in chosen:
                shutil.copy(source / folder / row["file_name"], raw / split / row["file_name"])
            with (raw / split / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(chosen)


def accuracies(run: Path, data: Path) -> dict[str, Part]:
    """Classify the test images with the best epoch of a run, and by the classifiers beside it."""
    content = load_checkpoint(run / "best.pt")
    given = {"data_dir": str(data)}
    settings = saved_settings(content, load_settings(given, environ={}), tuple(given))
    fine_tuned = load_fine_tuned(content, settings)
    pairs = EvaluationSet.open(fine_tuned.base.inputs, settings, "test")
    found = compare(pairs, load_model(settings, pretrained=True), fine_tuned).accuracy
    assert found and found.after
    return {**found.parts, "after": found.after}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--garments", type=Path, help="folder with products.csv")
    parser.add_argument("--groceries", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    args = parser.parse_args()
    seeds = 1 if args.quick else 3
    rows = list[Row]()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.garments:
        rows += garments(args.garments, args.out, seeds, args.quick)
    if args.groceries:
        rows += groceries(args.groceries, args.out, seeds, args.quick)
    if args.json:
        write_figures(args.json, "Q6", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
