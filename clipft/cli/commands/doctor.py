"""``clipft doctor``, ``cache``, ``settings``: what this machine has, and what a run would use."""

import json
import time
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end, print_error
from clipft.cli.options import command, flags_given
from clipft.cli.plain_table import rows_table
from clipft.config.fields import Section, setting
from clipft.config.sections.data import StorageSettings
from clipft.config.sections.measuring import TrackingSettings
from clipft.config.sections.model import ModelSettings
from clipft.config.sections.training import OptimSettings, RunSettings
from clipft.config.settings import SECTIONS, Settings
from clipft.config.settings_file import template
from clipft.config.sources import LoadedSettings
from clipft.core.cache import CACHES, CacheEntry, cache_entries, cache_folder, remove, to_prune
from clipft.core.common import counted, duration
from clipft.core.errors import NotReady, UsageError, did_you_mean

_COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


@command(
    StorageSettings, ModelSettings, OptimSettings, RunSettings, TrackingSettings, "num_workers"
)
def doctor(loaded: LoadedSettings, out: Output) -> None:
    """Check whether this machine is ready for a run.

    Checks the libraries, the GPU, memory, disks and limits, the data and the model, and also the
    bucket and Weights & Biases if the settings name them. Nothing is left behind: with
    --enable-s3-checkpoints, an empty object is written to the bucket and deleted again. The exit
    code is 10 if a run would fail.

    Examples:

        clipft doctor --model tiny
        clipft doctor --config clipft.toml
        clipft doctor --data-dir ./catalogue --scenario full --json
        clipft doctor --s3-bucket bucket --enable-s3-checkpoints
    """
    from clipft.doctor.examination import examine

    with out.progress("Checking this machine") as report:
        findings = examine(loaded.values, report)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in findings.items():
        text = Text(finding.found)
        if finding.hint:
            text.append(f"\n-> {finding.hint}")
        table.add_row(Text(finding.status, _COLORS[finding.status]), name, text)
    errors = [name for name, finding in findings.items() if finding.status == "error"]
    checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    out.result({"ready": not errors, "checks": checks}, table)
    if errors:
        first = findings[errors[0]]
        error = NotReady(
            f"{counted(len(errors), 'check')} failed, first {errors[0]}: {first.found}", first.hint
        )
        print_error(error, as_json=False)  # stdout has the JSON object already
        raise typer.Exit(error.exit_code)
    warnings = sum(finding.status == "warning" for finding in findings.values())
    out.note(f"Ready, with {counted(warnings, 'warning')}." if warnings else "Ready.")
    has_pairs = findings["pairs"].status == "ok"
    end(out, {}, ("train", *flags_given(loaded), "--plan") if has_pairs else ())


class SettingsOptions(Section):
    title = "Output"
    template: bool = setting(
        False, "Print a settings file that explains every setting and sets none."
    )
    # pydantic's models have a method `schema`
    schema_: bool = setting(False, "Print the JSON schema of a settings file, for editors.")


@command(*SECTIONS, options=SettingsOptions)
def settings(loaded: LoadedSettings, options: SettingsOptions, out: Output) -> None:
    """Print the settings as TOML, each with its source.

    The source, such as a flag, a file or the default, is a comment after the value. Save the
    output to a file and pass it to --config to use the same settings again.

    Examples:

        clipft settings > clipft.toml
        clipft settings --config clipft.toml --lr 3e-4
        CLIPFT_LR=3e-4 clipft settings --scenario vision_lora
        clipft settings --template > clipft.toml
        clipft settings --schema > clipft.schema.json
    """
    if options.template and options.schema_:
        raise UsageError("--template and --schema cannot be used together", "choose one of them")
    if options.schema_:
        schema = Settings.model_json_schema()
        out.raw(schema, json.dumps(schema, indent=2) + "\n")
    elif options.template:
        out.raw({"template": template()}, template())
    else:
        values = loaded.values.model_dump(mode="json")
        out.raw({"settings": values, "origins": loaded.origins}, loaded.to_toml())


class CacheOptions(Section):
    title = "Cache"
    all: bool = setting(False, "Show every item, not only the kinds.")
    prune: bool = setting(
        False,
        "Remove the items that the options below select; without any, all items. They are made "
        "or downloaded again when they are needed.",
    )
    kind: tuple[str, ...] = setting(
        (), "Only items of this kind. May be repeated.", metavar="KIND", choices=tuple(CACHES)
    )
    unused_days: float = setting(0, "Only items not used for this many days.", unit="days", ge=0)
    keep: float | None = setting(
        None,
        "Only the least recently used items, until the cache has at most this size, in GiB.",
        unit="GiB",
        ge=0,
    )


@command(options=CacheOptions)
def cache(options: CacheOptions, out: Output) -> None:
    """Show what the cache holds, and prune it.

    The cache keeps what is slow to compute or to download: features of frozen encoders, embeddings
    of images, tokens of captions, converted models, pairs from buckets. Without --prune, nothing
    is removed, and the options choose what is shown. The folder is CLIPFT_CACHE, or clipft in the
    user's cache folder. The setting cache_limit limits the computed data.

    Examples:

        clipft cache
        clipft cache --all --unused-days 30
        clipft cache --prune --unused-days 30
        clipft cache --prune --kind features --kind pictures
        clipft cache --prune --keep 20
    """
    if unknown := [kind for kind in options.kind if kind not in CACHES]:
        raise UsageError(
            f"unknown kind of cache {unknown[0]!r}",
            did_you_mean(unknown[0], CACHES) or f"choose from {', '.join(CACHES)}",
        )
    keep = None if options.keep is None else int(options.keep * 2**30)
    chosen = to_prune(cache_entries(), options.kind, options.unused_days, keep)
    if options.prune:
        for entry in chosen:
            remove(entry)
    size = f"{sum(entry.bytes for entry in chosen) / 2**30:.2f} GiB"
    summary = f"{counted(len(chosen), 'item')}, {size}, in {cache_folder()}"
    content = {
        "folder": str(cache_folder()),
        "removed" if options.prune else "entries": [entry.to_dict() for entry in chosen],
    }
    heading = f"Removed {summary}" if options.prune else f"Cache: {summary}"
    shown = _entry_rows(chosen) if options.all else _kind_rows(chosen)
    columns = ("size", "last used", "content")
    out.result(content, rows_table(heading, columns, shown, texts=(2,)))


def _entry_rows(entries: list[CacheEntry]) -> list[tuple[str, ...]]:
    return [
        (entry.kind, *_size_and_age(entry.bytes, entry.last_used), _name(entry))
        for entry in reversed(entries)
    ]


def _name(entry: CacheEntry) -> str:
    return f"{entry.path.name}, unfinished" if entry.unfinished else entry.path.name


def _kind_rows(entries: list[CacheEntry]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for kind, (_, content) in CACHES.items():
        found = [entry for entry in entries if entry.kind == kind]
        if found:
            size, latest = sum(e.bytes for e in found), max(e.last_used for e in found)
            rows.append((kind, *_size_and_age(size, latest), f"{len(found):,}: {content}"))
    return rows


def _size_and_age(size: int, last_used: float) -> tuple[str, str]:
    age = max(0.0, time.time() - last_used)
    days = round(age / 86400)
    return f"{size / 2**20:,.1f} MiB", f"{duration(age) if days < 2 else f'{days} days'} ago"
