"""``clipft inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.settings import LoadedSettings

if TYPE_CHECKING:
    from clipft.data.inspection import PairFacts, SplitFacts
    from clipft.data.shards import PairDataset
    from clipft.modelling.base import BaseModel

Data = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DATA]",
        help="Folder with train/ and val/, or of shards [default: --data-dir]",
        show_default=False,
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(
        "--against",
        metavar="DATA",
        help="Another folder: what stands in both [default: none]",
        show_default=False,
        rich_help_panel="Inspection",
    ),
]
Near = Annotated[
    int,
    typer.Option(
        "--near",
        min=0,
        max=8,
        metavar="BITS",
        help="Photos are compared where their 64-bit hashes differ in at most so many bits",
        rich_help_panel="Inspection",
    ),
]


@settings_command("model", "data_dir")
def inspect(
    loaded: LoadedSettings,
    out: Output,
    data: Data = None,
    against: Against = None,
    near: Near = 4,
) -> None:
    """What is in a catalogue and what is wrong with it, before training on it.

    Broken pictures, sizes, caption lengths, duplicates, what stands in both training and
    validation, and the best R@K that the duplicates leave possible.

    Examples:

        clipft inspect ./catalogue
        clipft inspect ./catalogue --against ./general --json
    """
    from clipft.data.inspection import leak, read_facts
    from clipft.modelling.base import load_base

    base = load_base(loaded.values.model)
    splits = _splits(data or loaded.values.data_dir)
    facts: dict[str, list[PairFacts]] = {}
    for name, pairs in splits.items():
        with out.progress(f"Reading {name}, {len(pairs):,} pairs") as report:
            facts[name] = read_facts(pairs, report)
    figures = {name: _figures(splits[name], facts[name], base, near) for name in splits}
    result: dict[str, Any] = {name: split.to_dict() for name, split in figures.items()}
    shown = [_table(figures)]
    if {"train", "val"} <= facts.keys():
        result["val_in_train"] = leak(facts["val"], facts["train"], near).to_dict()
        shown.append(_leak_table("Validation pairs that training has too", result["val_in_train"]))
    if against:
        others = [fact for pairs in _splits(against).values() for fact in read_facts(pairs, _quiet)]
        ours = [fact for split in facts.values() for fact in split]
        result["against"] = leak(ours, others, near).to_dict()
        shown.append(_leak_table(f"Pairs that {against} has too", result["against"]))
    out.result(result, *shown)
    for name, split in figures.items():
        for broken in split.broken[:5]:
            out.note(f"broken in {name}: {broken['pair']} ({broken['reason']})")


def _quiet(done: int, total: int) -> None:
    return None


def _splits(folder: Path) -> "dict[str, PairDataset]":
    from clipft.data.shards import open_pairs

    names = [name for name in ("train", "val") if (folder / name).is_dir()]
    if not names:
        return {folder.name: open_pairs(folder)}
    return {name: open_pairs(folder / name) for name in names}


def _figures(
    pairs: "PairDataset", facts: "list[PairFacts]", base: "BaseModel", near: int
) -> "SplitFacts":
    from clipft.data.inspection import split_facts

    words = [fact.words for fact in facts if not fact.broken]
    encoded = base.tokenizer(words)["input_ids"] if words else []
    lengths = [len(ids) for ids in encoded]
    return split_facts(pairs, facts, lengths, base.context_length, base.image_size, near)


def _table(figures: "dict[str, SplitFacts]") -> Table:
    table = Table(title="Catalogue", title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    rows = [_rows(split) for split in figures.values()]
    for label in rows[0]:
        table.add_row(label, *(row[label] for row in rows))
    return table


def _rows(split: "SplitFacts") -> dict[str, str]:
    def spread(values: dict[str, float]) -> str:
        return " / ".join(f"{value:g}" for value in values.values()) or "-"

    ceilings = split.ceiling
    return {
        "pairs": f"{split.pairs:,}",
        "members that are no pairs": f"{sum(split.no_pairs.values()):,}",
        "broken": f"{len(split.broken):,}",
        "formats": ", ".join(f"{kind} {count:,}" for kind, count in split.kinds.items()) or "-",
        "shorter side, min / median / max": spread(split.shorter_side),
        "smaller than the model's input": f"{split.smaller_than_model:,}",
        "caption tokens, min / median / max": spread(split.caption_tokens),
        "captions too long, cut": f"{split.captions_cut:,}",
        "photos again, same bytes": f"{split.same_photo:,}",
        "photos with a near-identical one": f"{split.near_photo:,}",
        "captions again": f"{split.same_caption:,}",
        "largest group of duplicates": f"{split.largest_group:,}",
        "best possible text -> image R@1": f"{ceilings['text_to_image']['r@1']:.1%}",
        "best possible image -> text R@1": f"{ceilings['image_to_text']['r@1']:.1%}",
    }


def _leak_table(title: str, figures: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("same photo", f"{figures['same_photo']:,}")
    table.add_row("near-identical photo", f"{figures['near_photo']:,}")
    table.add_row("same caption", f"{figures['same_caption']:,}")
    for key in figures["examples"]:
        table.add_row("for example", key)
    return table
