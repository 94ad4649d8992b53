"""``clipft inspect``."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command, flags_given
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data, local_data
from clipft.config.fields import File, Section, setting
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.files import check_writable
from clipft.data.packing.options import NEAR_BITS

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.data.captions.template import CaptionTemplate
    from clipft.data.inspection import Links, SplitFacts
    from clipft.data.pair_facts import PairFacts
    from clipft.data.shards.dataset import PairDataset
    from clipft.models.pretrained import ModelInputs
    from clipft.report.html import PageTable
    from clipft.report.inspection_page import Inspected

_NAMES = {"train": "Training", "val": "Validation", "test": "Test"}
_LISTED = 5
"""Broken pairs named for each split; the JSON has all of them."""
_SKIPPED = "Skipped by clipft pack"
_SAMPLES = 6
"""Pairs of each split that the page shows as examples of the data."""


class InspectOptions(Section):
    title = "Inspection"
    against: Path | None = setting(
        None, "Another data set, to find the pairs that are in both.", metavar="DATA"
    )
    near: int = setting(
        NEAR_BITS,
        "Images are near-duplicates if their 64-bit perceptual hashes differ in at most this "
        "many bits.",
        unit="bits",
        ge=0,
        le=8,
    )
    html: File | None = setting(
        None, "Also write a page with the figures and the images they concern.", metavar="FILE"
    )


@command(
    "model",
    "data_dir",
    "caption",
    "caption_lines",
    "num_workers",
    *LOCATION_SETTINGS,
    options=InspectOptions,
)
def inspect(
    loaded: LoadedSettings,
    options: InspectOptions,
    out: Output,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Folder of shards, or folder with train/ and val/. Default: --data-dir.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a data set contains, and what is wrong with it.

    Reports broken images, image sizes, caption lengths in tokens of --model, duplicates, pairs
    that are in two of training, validation and test, and the highest R@K that the duplicates allow.

    Examples:

        clipft inspect ./catalogue --html findings.html
        clipft inspect ./catalogue --against ./general --json
    """
    from clipft.cli.preflight import import_libraries
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate
    from clipft.models.source import check_model

    if data is None:
        bring_named_data(loaded, out)
        folder = loaded.values.data_dir
    else:
        folder = local_data(data, loaded.values, out)
    splits = _splits(folder)
    others = _splits(options.against, named=True) if options.against else {}
    if options.html:
        check_writable(options.html)
    template = CaptionTemplate.of(loaded.values)
    template = template.for_evaluation()
    for pairs in (splits | others).values():
        check_fields(template, pairs)
    check_model(loaded.values.model)
    import_libraries("AutoTokenizer")
    from clipft.data.inspection import leak, near_images
    from clipft.data.packing.target import skipped_by_pack
    from clipft.models.pretrained import load_inputs
    from clipft.report.findings import findings, verdict

    model = load_inputs(loaded.values.model, loaded.values.input_sizes)
    read = partial(_read, out, max(1, loaded.values.workers()), template)
    facts = {name: read(name, pairs) for name, pairs in splits.items()}
    theirs = [fact for name, pairs in others.items() for fact in read(name, pairs)]
    everything = [*chain.from_iterable(facts.values()), *theirs]
    near = near_images(everything, options.near)
    figures = {name: _figures(splits[name], facts[name], model, near) for name in splits}
    result: dict[str, Any] = {name: asdict(split) for name, split in figures.items()}
    shared = {}
    for one, other in combinations(facts, 2):  # in the order train, val, test
        found = result[f"{other}_in_{one}"] = asdict(leak(facts[other], facts[one], near))
        shared[f"{_NAMES[other]} pairs that are also in {_NAMES[one].lower()}"] = found
    if options.against:
        ours = list(chain.from_iterable(facts.values()))
        result["against"] = asdict(leak(ours, theirs, near))
        shared[f"Pairs that are also in {options.against}"] = result["against"]
    result["skipped_by_pack"] = skipped = skipped_by_pack(folder)
    dicts = {name: result[name] for name in splits}
    troubles = findings(dicts, shared, loaded.values.max_bad)
    result["findings"] = [asdict(finding) for finding in troubles]
    result["verdict"] = verdict(troubles, dicts)
    if options.html:
        from clipft.report.html import write_page
        from clipft.report.inspection_page import Inspected

        inspected = Inspected(
            title=f"Data set {folder}",
            verdict=result["verdict"],
            findings=troubles,
            tables=_page_tables(figures, shared, skipped),
            splits=dicts,
            leaks=shared,
            samples={name: _samples(facts[name]) for name in splits},
            image_size=model.image_size,
            context=model.context_length,
        )
        write_page(options.html, _page(inspected, splits | others, everything))

    out.result(result, *_tables(figures, shared, skipped))
    for name, split in figures.items():
        listed = (split.broken, split.bad_captions, split.bad_metadata)
        for broken in [found for each in listed for found in each[:_LISTED]]:
            out.note(f"broken in {name}: {broken['pair']} ({broken['reason']})")
    # Last, beside the cursor: the tables are longer than a screen
    out.note(result["verdict"])
    for finding in troubles:
        out.note(f"- {finding.text}. {finding.advice}")
    complete = {"train", "val"} <= splits.keys()
    following = ("zero-shot", "--data-dir", folder, *flags_given(loaded, "model"))
    end(out, {"page": options.html}, following if complete else ())


def _splits(folder: Path, named: bool = False) -> "dict[str, PairDataset]":
    """The pairs by split; ``named`` puts the folder before it, to tell two data sets apart."""
    from clipft.data.shards.folders import open_pairs
    from clipft.data.shards.names import tars_in

    names = [name for name in ("train", "val") if (folder / name).is_dir()]
    names += ["test"] if tars_in(folder / "test") else []
    if not names:
        return {str(folder) if named else folder.resolve().name: open_pairs(folder)}
    return {str(folder / name) if named else name: open_pairs(folder / name) for name in names}


def _read(
    out: Output, workers: int, template: "CaptionTemplate", name: str, pairs: "PairDataset"
) -> "list[PairFacts]":
    from clipft.data.pair_facts import read_facts

    with out.progress(f"Reading {name}, {counted(len(pairs), 'pair')}") as report:
        return read_facts(pairs, report, workers, name, template)


def _figures(
    pairs: "PairDataset", facts: "list[PairFacts]", model: "ModelInputs", near: "Links"
) -> "SplitFacts":
    from clipft.data.captions.tokenizer import CaptionEncoder
    from clipft.data.inspection import split_facts

    encoder = CaptionEncoder(model.tokenizer, model.context_length)
    encoded = encoder([caption for fact in facts if fact.usable for caption in fact.captions])
    return split_facts(pairs, facts, encoded, model.context_length, model.image_size, near)


def _rows(figures: "dict[str, SplitFacts]") -> list[list[str]]:
    """Rows of a label and a cell for each split."""
    rows: dict[str, list[str]] = {}
    reasons = sorted({reason for split in figures.values() for reason in split.no_pairs})
    several = any(split.captions != split.usable for split in figures.values())
    for split in figures.values():
        # Both are empty if no pair of the split can be read
        side, tokens = (
            "/".join(f"{value:g}" for value in values.values()) or "-"
            for values in (split.shorter_side, split.caption_tokens)
        )
        highest = {
            direction: "/".join(f"{100 * value:.1f}" for value in values.values())
            for direction, values in split.ceiling.items()
        }
        lost = f"{split.tokens_lost:.0%}"
        broken_characters = split.captions_with_broken_characters["pairs"]
        labels = "-"
        if split.categories:
            found = split.categories
            labels = f"{len(found['counts']):,} ({found['field']} of {found['labelled']:,})"
        cells = {
            "pairs": f"{split.pairs:,}",
            **({"captions": f"{split.captions:,}"} if several else {}),
            "size": f"{split.bytes / 2**20:.1f} MiB",
            "files that are not pairs": f"{sum(split.no_pairs.values()):,}",
            **{f"- {reason}": f"{split.no_pairs.get(reason, 0):,}" for reason in reasons},
            "broken images": f"{len(split.broken):,}",
            "bad captions": f"{len(split.bad_captions):,}",
            "formats": ", ".join(f"{kind} {count:,}" for kind, count in split.kinds.items()) or "-",
            "more than 8 bits per channel": f"{split.more_than_8_bits:,}",
            "shorter side: min/median/max": side,
            "smaller than model's input": f"{split.smaller_than_model:,}",
            "tokens: min/median/max": tokens,
            "truncated captions": f"{split.captions_cut:,}",
            "tokens lost by those captions": lost,
            "HTML in captions": f"{split.captions_with_html['pairs']:,}",
            "broken characters in captions": f"{broken_characters:,}",
            "unreadable metadata": f"{len(split.bad_metadata):,}",
            "identical images": f"{split.same_photo:,}",
            "near-duplicate images": f"{split.near_photo:,}",
            "repeated captions": f"{split.same_caption:,}",
            "groups of duplicates": f"{split.groups:,}",
            "largest group of duplicates": f"{split.largest_group:,}",
            "labels in the metadata": labels,
            "highest text -> image R@1/5/10, %": highest["text_to_image"],
            "highest image -> text R@1/5/10, %": highest["image_to_text"],
        }
        for label, cell in cells.items():
            rows.setdefault(label, [label]).append(cell)
    return list(rows.values())


def _shared_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        ["identical image", f"{found['same_photo']:,}"],
        ["near-duplicate image", f"{found['near_photo']:,}"],
        ["same caption", f"{found['same_caption']:,}"],
    ]


def _skipped_rows(skipped: dict[str, int]) -> list[list[str]]:
    return [[reason, f"{count:,}"] for reason, count in skipped.items()]


def _tables(
    figures: "dict[str, SplitFacts]", shared: dict[str, dict[str, Any]], skipped: dict[str, int]
) -> "Iterator[Table]":
    from clipft.cli.plain_table import rows_table

    yield rows_table("Data set", [*figures], _rows(figures))
    for title, found in shared.items():
        rows = _shared_rows(found)
        for match in found["matches"][: len(found["examples"])]:
            rows.append([f"example: {match['shares']}", f"{match['pair']}\n= {match['other']}"])
        yield rows_table(title, [""], rows)
    if skipped:
        yield rows_table(_SKIPPED, [""], _skipped_rows(skipped))


def _page_tables(
    figures: "dict[str, SplitFacts]", shared: dict[str, dict[str, Any]], skipped: dict[str, int]
) -> "list[PageTable]":
    from clipft.report.html import PageTable

    tables = [PageTable("Figures", list(figures), _rows(figures), heading=True)]
    tables += [
        PageTable(title, ["pairs"], _shared_rows(found), heading=True)
        for title, found in shared.items()
    ]
    if skipped:
        tables.append(PageTable(_SKIPPED, ["pairs"], _skipped_rows(skipped), heading=True))
    return tables


def _samples(facts: "list[PairFacts]") -> list[str]:
    """Places of usable pairs, spread evenly over the split."""
    usable = [fact.place for fact in facts if fact.usable]
    return usable[:: max(1, len(usable) // _SAMPLES)][:_SAMPLES]


def _page(
    inspected: "Inspected", sources: "dict[str, PairDataset]", facts: "list[PairFacts]"
) -> str:
    from clipft.data.images.decode import decode_image
    from clipft.report.html import SIDE, PageImage, thumbnail
    from clipft.report.inspection_page import findings_page

    by_place = {fact.place: fact for fact in facts}

    def read_image(place: str) -> PageImage:
        fact = by_place[place]
        image = decode_image(sources[fact.split][fact.number].image, at_least=SIDE)
        return PageImage(place, fact.caption, thumbnail(image))

    return findings_page(inspected, read_image)
