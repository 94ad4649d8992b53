"""``clipft inspect``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end
from clipft.cli.options import flags_given, settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data, local_data
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.files import check_writable
from clipft.data.packing.options import NEAR_BITS

if TYPE_CHECKING:
    from clipft.data.captions.template import CaptionTemplate
    from clipft.data.inspection import PairFacts, SplitFacts
    from clipft.data.shards.dataset import PairDataset
    from clipft.models.pretrained import ModelInputs

Data = Annotated[
    Path | None,
    typer.Argument(
        metavar="DATA",
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
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        dir_okay=False,
        metavar="FILE",
        help="Also a page with the figures and pictures of what was found [default: none]",
        show_default=False,
        rich_help_panel="Inspection",
    ),
]


@settings_command("model", "data_dir", "caption", "num_workers", *LOCATION_SETTINGS)
def inspect(
    loaded: LoadedSettings,
    out: Output,
    data: Data = None,
    against: Against = None,
    near: Near = NEAR_BITS,
    html: Html = None,
) -> None:
    """Say what is in a catalogue and what is wrong with it.

    Broken pictures, sizes, caption lengths in tokens of --model, duplicates, what stands in both
    training and validation, and the best R@K that the duplicates leave possible.

    Examples:

        clipft inspect ./catalogue --html findings.html
        clipft inspect ./catalogue --against ./general --json
    """
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate
    from clipft.data.inspection import leak
    from clipft.models.pretrained import load_inputs

    if data is None:
        bring_named_data(loaded, out)
    else:
        data = local_data(data, loaded.values, out)
    folder, workers = data or loaded.values.data_dir, loaded.values.num_workers
    splits = _splits(folder)
    others = _splits(against, named=True) if against else {}
    if html:
        check_writable(html)
    template = CaptionTemplate.parse(loaded.values.caption)
    for pairs in (splits | others).values():
        check_fields(template, pairs)
    model = load_inputs(loaded.values.model)
    read = partial(_read, out, workers, template)
    facts = {name: read(name, pairs) for name, pairs in splits.items()}
    figures = {name: _figures(splits[name], facts[name], model, near) for name in splits}
    result: dict[str, Any] = {name: split.to_dict() for name, split in figures.items()}
    leaks = {}
    if {"train", "val"} <= facts.keys():
        result["val_in_train"] = leak(facts["val"], facts["train"], near).to_dict()
        leaks["Validation pairs that training has too"] = result["val_in_train"]
    if against:
        theirs = {name: read(name, pairs) for name, pairs in others.items()}
        result["against"] = leak(_all(facts), _all(theirs), near).to_dict()
        leaks[f"Pairs that {against} has too"] = result["against"]
        facts |= theirs
    if html:
        from clipft.report.html import write_page

        heading = f"What is in {folder}"
        write_page(html, _page(heading, figures, leaks, splits | others, _all(facts)))
    tables = [_leak_table(title, found) for title, found in leaks.items()]
    out.result(result, _table(figures), *tables)
    for name, split in figures.items():
        for broken in [*split.broken[:5], *split.bad_captions[:5]]:
            out.note(f"broken in {name}: {broken['pair']} ({broken['reason']})")
    trains = {"train", "val"} <= splits.keys()
    following = ("zero-shot", "--data-dir", folder, *flags_given(loaded, "model"))
    end(out, {"page": html}, following if trains else ())


def _read(
    out: Output, workers: int, template: "CaptionTemplate", name: str, pairs: "PairDataset"
) -> "list[PairFacts]":
    from clipft.data.inspection import read_facts

    with out.progress(f"Reading {name}, {counted(len(pairs), 'pair')}") as report:
        return read_facts(pairs, report, max(1, workers), name, template)


def _all(facts: "dict[str, list[PairFacts]]") -> "list[PairFacts]":
    return [fact for split in facts.values() for fact in split]


def _splits(folder: Path, named: bool = False) -> "dict[str, PairDataset]":
    """Shards by split; ``named`` puts the folder before, to tell two catalogues apart."""
    from clipft.data.shards.dataset import open_pairs

    names = [name for name in ("train", "val") if (folder / name).is_dir()]
    if not names:
        return {str(folder) if named else folder.resolve().name: open_pairs(folder)}
    return {str(folder / name) if named else name: open_pairs(folder / name) for name in names}


def _figures(
    pairs: "PairDataset", facts: "list[PairFacts]", model: "ModelInputs", near: int
) -> "SplitFacts":
    from clipft.data.captions.tokenizer import CaptionEncoder
    from clipft.data.inspection import split_facts

    captions = [fact.caption for fact in facts if fact.usable]
    encoder = CaptionEncoder(model.tokenizer, model.context_length)
    lengths = [encoded.length for encoded in encoder(captions)]
    return split_facts(pairs, facts, lengths, model.context_length, model.image_size, near)


def _table(figures: "dict[str, SplitFacts]") -> Table:
    table = Table(title="Catalogue", title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right", overflow="fold")
    for row in _rows(figures):
        table.add_row(*row)
    return table


def _rows(figures: "dict[str, SplitFacts]") -> list[list[str]]:
    """A label and a cell per split."""
    columns = [_column(split) for split in figures.values()]
    return [[label, *(column[label] for column in columns)] for label in columns[0]]


def _column(split: "SplitFacts") -> dict[str, str]:
    def joined(values: dict[str, float]) -> str:
        return "/".join(f"{value:g}" for value in values.values()) or "-"

    def best(direction: str) -> str:
        return "/".join(f"{100 * value:.1f}" for value in split.ceiling[direction].values())

    return {
        "pairs": f"{split.pairs:,}",
        "size": f"{split.bytes / 2**20:.1f} MiB",
        "members that are no pairs": f"{sum(split.no_pairs.values()):,}",
        "broken pictures": f"{len(split.broken):,}",
        "bad captions": f"{len(split.bad_captions):,}",
        "formats": ", ".join(f"{kind} {count:,}" for kind, count in split.kinds.items()) or "-",
        "shorter side: min/median/max": joined(split.shorter_side),
        "smaller than model's input": f"{split.smaller_than_model:,}",
        "tokens: min/median/max": joined(split.caption_tokens),
        "captions too long, cut": f"{split.captions_cut:,}",
        "photos again, same bytes": f"{split.same_photo:,}",
        "with a near-identical photo": f"{split.near_photo:,}",
        "captions again": f"{split.same_caption:,}",
        "groups of duplicates": f"{split.groups:,}",
        "largest group of duplicates": f"{split.largest_group:,}",
        "labels in the metadata": _labels(split.categories),
        "best text -> image R@1/5/10, %": best("text_to_image"),
        "best image -> text R@1/5/10, %": best("image_to_text"),
    }


def _labels(found: dict[str, Any]) -> str:
    if not found:
        return "-"
    return f"{len(found['counts']):,} ({found['field']} of {found['labelled']:,})"


def _leak_rows(figures: dict[str, Any]) -> list[list[str]]:
    counts = ("same_photo", "near_photo", "same_caption")
    labels = ("same photo", "near-identical photo", "same caption")
    return [[label, f"{figures[c]:,}"] for label, c in zip(labels, counts, strict=True)]


def _leak_table(title: str, figures: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in _leak_rows(figures):
        table.add_row(*row)
    for match in figures["matches"][: len(figures["examples"])]:
        remark = Text(f"{match['pair']}\n= {match['other']}", overflow="fold")
        table.add_row(f"for example, by {match['shares']}", remark)
    return table


def _page(
    heading: str,
    figures: "dict[str, SplitFacts]",
    leaks: dict[str, dict[str, Any]],
    sources: "dict[str, PairDataset]",
    facts: "list[PairFacts]",
) -> str:
    from clipft.data.images import decode_image
    from clipft.report.html import SIDE, PageImage, PageTable, thumbnail
    from clipft.report.inspection_page import findings_page

    by_place = {fact.place: fact for fact in facts}

    def read_image(place: str) -> PageImage:
        fact = by_place[place]
        image = decode_image(sources[fact.split][fact.number].image, at_least=SIDE)
        return PageImage(place, fact.caption, thumbnail(image))

    tables = [PageTable("Figures", list(figures), _rows(figures), heading=True)]
    tables += [
        PageTable(title, ["pairs"], _leak_rows(found), heading=True)
        for title, found in leaks.items()
    ]
    splits = {name: split.to_dict() for name, split in figures.items()}
    return findings_page(heading, tables, splits, leaks, read_image)
