"""``clipft doctor``."""

from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end, print_error
from clipft.cli.options import command, flags_given
from clipft.config.settings import (
    ModelSettings,
    OptimSettings,
    RunSettings,
    StorageSettings,
    TrackingSettings,
)
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import NotReady

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
