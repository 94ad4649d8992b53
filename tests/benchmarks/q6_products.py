"""Q6: photos of a product, several fields, and labels, on real catalogues.

Garments: does ``--photo-pairs`` find another photo of the same product more often, and at what cost
from text to image; and what do ``--fields`` gain and cost beside name and color alone? The products
are divided into three folds, and each fold is measured with runs that were trained and chosen on
the others, so that every product is tested once by each seed. Groceries: the accuracy of training
on labels, beside the same prompts, a linear classifier and Tip-Adapter on the pretrained model, on
the set's own test photos. All start from the packaged tiny model. Intervals cover other products,
or images, and other seeds (``clipft.metrics.comparisons``).

GARMENTS holds products.csv (image, product_id, name, color, material, description), and GROCERIES
train/ and val/ with a metadata.csv (file_name, label). ``catalogues.py`` divides them.

Run the same command again to continue: what is finished in --out is not repeated.

    python tests/benchmarks/q6_products.py --garments DIR --groceries DIR --out DIR [--json FILE]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from catalogues import CAPTION, FOLDS, GROUP, clipft, packed
from side_by_side import arguments, write_figures

from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.embedding.load import LoadedModel, load_model
from clipft.evaluation.evaluator import EvaluationSet, compare
from clipft.metrics.comparisons import over_seeds_and_queries
from clipft.metrics.definitions import Floats
from clipft.metrics.retrieval import Evaluation, Part
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.load import load_fine_tuned
from clipft.runs.places import saved_settings

PLAIN = ("--caption", CAPTION)
GARMENTS = {
    "name and color": PLAIN,
    "photo pairs 1": (*PLAIN, "--photo-pairs", "1"),
    "fields": ("--fields", "name:1,description:0.5,material:0.2"),
}
LABELS = {
    "labels": ("--lr", "4e-3", "--epochs", "40"),
}
QUERIES = (CAPTION, "{name}", "{description}")
COMPARED = (
    ("name and color", "pretrained", QUERIES[:1]),
    ("photo pairs 1", "name and color", QUERIES[:1]),
    ("fields", "name and color", QUERIES),
)
FIGURES = (
    ("photos", "image_to_image", "hit@1"),
    ("photos", "image_to_image", "map"),
    ("grouped", "text_to_image", "hit@10"),
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


@dataclass(frozen=True)
class Work:
    """What is done in ``place``: seeds, folds, and options that replace those of a recipe."""

    place: Path
    seeds: int
    folds: int
    replaced: tuple[str, ...] = ()


def train(data: Path, out: Path, options: Sequence[str], seed: int) -> Path:
    """Train, unless that is done already, and return the run folder."""
    if not (out / "dual_lora" / "result.json").exists():
        recipe = {**RECIPE, "seed": seed}
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in recipe.items()]
        words = [word for pair in given for word in pair]
        clipft("train", "--data-dir", data, "--output-dir", out, *words, *options)
    return out / "dual_lora"


def opened(run: Path, given: dict[str, str]) -> tuple[Settings, LoadedModel]:
    """Open the best epoch of a run, with ``given`` in place of its own settings."""
    content = load_checkpoint(run / "best.pt")
    settings = saved_settings(content, load_settings(given, environ={}), tuple(given))
    return settings, load_fine_tuned(content, settings)


def same_resamples(settings: Settings, number: int) -> Settings:
    """Resample alike for all runs that are measured on the same pairs."""
    return settings.model_copy(update={"seed": number})


Parts = list[list[Part]]
"""A figure by seed, then by fold."""


def by_seed(parts: Parts, name: str) -> tuple[Floats, Floats]:
    """A figure over the queries of all folds: its value, [seeds], and that of each resample,
    [seeds, resamples]."""
    queries = [part.queries for part in parts[0]]
    values = [[part.means[name] for part in folds] for folds in parts]
    drawn = [[part.resampled[name] for part in folds] for folds in parts]
    return np.average(values, 1, queries), np.average(drawn, 1, queries)


def compared(names: tuple[str, str, str], figure: str, ours: Parts, theirs: Parts) -> Row:
    """Compare two sides; ``names`` are the data and the two sides."""
    last = figure.split()[-1]
    (value, drawn), (base, base_drawn) = by_seed(ours, last), by_seed(theirs, last)
    found = over_seeds_and_queries((value - base).tolist(), drawn - base_drawn, seed=1)
    numbers = (base.mean(), value.mean(), found["value"], found["low"], found["high"])
    data, variant, other = names
    row = Row(data, variant, figure, other, *(round(100 * float(n), 1) for n in numbers))
    print(row, flush=True)
    return row


def garments(source: Path, work: Work) -> Iterator[Row]:
    folds = packed(source, work.place / "garments", *SMALL_FILES)[: work.folds]
    more = ("--group-field", GROUP, "--epochs", "12", *work.replaced)

    @cache
    def measured(variant: str, query: str) -> list[list[Evaluation]]:
        """By seed, then by fold. The pretrained model has no seed: it is that of the first runs."""
        pretrained = variant == "pretrained"
        name, seeds = ("name and color", 1) if pretrained else (variant, work.seeds)
        found = []
        for seed in range(1, seeds + 1):
            of_folds = []
            for fold, data in enumerate(folds):
                out = work.place / f"{name}-{fold}-{seed}"
                run = train(data, out, (*GARMENTS[name], *more), seed)
                of_folds.append(evaluated(run, data, fold, query, pretrained))
            found.append(of_folds)
        return found

    for variant, other, queries in COMPARED:
        for query, (protocol, direction, name) in product(queries, FIGURES):
            if protocol == "photos" and query != QUERIES[0]:
                continue  # it has no query of words
            ours, theirs = (
                [
                    [each.parts[protocol][direction] for each in seed]
                    for seed in measured(side, query)
                ]
                for side in (variant, other)
            )
            names = (f"garments, {query}", variant, other)
            yield compared(names, f"{protocol} {direction} {name}", ours, theirs)


def evaluated(run: Path, data: Path, fold: int, caption: str, pretrained: bool) -> Evaluation:
    """Evaluate a run, or the model that it began with, on the test pairs, with these captions as
    queries."""
    given = {"data_dir": str(data), "caption": caption, "group_field": GROUP}
    settings, chosen = opened(run, given)
    if pretrained:
        chosen = load_model(settings, pretrained=True)
    again = same_resamples(settings, 1 + fold)
    return EvaluationSet.open(chosen.base.inputs, again, "test").evaluate(chosen).evaluation


def groceries(source: Path, work: Work) -> Iterator[Row]:
    (data,) = packed(source, work.place / "groceries", *SMALL_FILES)
    labeled = ("--label-field", "label", "--label-prompts", "general")
    for variant, options in LABELS.items():
        runs = [
            train(
                data, work.place / f"{variant}-{seed}", (*labeled, *options, *work.replaced), seed
            )
            for seed in range(1, work.seeds + 1)
        ]
        found = [accuracies(run, data) for run in runs]
        for other in ("zero_shot", "linear", "tip_adapter"):
            ours, theirs = ([[each[side]] for each in found] for side in ("fine-tuned", other))
            yield compared(("groceries", variant, other), "accuracy top1", ours, theirs)


def accuracies(run: Path, data: Path) -> dict[str, Part]:
    """Classify the test images with the best epoch of a run, and by the classifiers beside it."""
    settings, fine_tuned = opened(run, {"data_dir": str(data)})
    again = same_resamples(settings, 1)
    pairs = EvaluationSet.open(fine_tuned.base.inputs, again, "test")
    found = compare(pairs, load_model(settings, pretrained=True), fine_tuned).accuracy
    assert found and found.after
    return {**found.parts, "fine-tuned": found.after}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--garments", type=Path, help="folder with products.csv")
    parser.add_argument("--groceries", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    args = parser.parse_args()
    work = Work(args.out, 3, FOLDS)
    if args.quick:
        work = Work(args.out, 1, 1, ("--epochs", "2"))
    rows = list[Row]()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.garments:
        rows += garments(args.garments, work)
    if args.groceries:
        rows += groceries(args.groceries, work)
    if args.json:
        write_figures(args.json, "Q6", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
