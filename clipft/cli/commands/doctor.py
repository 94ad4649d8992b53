"""``clipft doctor`` and ``clipft settings``: what a run would find here, and what it would use."""

import json
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end, print_error
from clipft.cli.options import command, flags_given
from clipft.config.fields import Section, setting
from clipft.config.settings import (
    SECTIONS,
    ModelSettings,
    OptimSettings,
    RunSettings,
    Settings,
    StorageSettings,
    TrackingSettings,
)
from clipft.config.settings_file import template
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import NotReady, UsageError

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
