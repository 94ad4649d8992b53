"""``clipft doctor``."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from clipft.cli.console import Output, end, print_error
from clipft.cli.options import flags_given, settings_command
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

if TYPE_CHECKING:
    from clipft.doctor import Finding

_LOOKED_AT = (StorageSettings, ModelSettings, OptimSettings, RunSettings, TrackingSettings)
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@settings_command(*_LOOKED_AT, "num_workers")
def doctor(loaded: LoadedSettings, out: Output) -> None:
    """Say whether this machine is ready, and what to do if not.

    Looks at the libraries, the GPU, memory, disks and limits, at the pairs and the model; at
    the bucket and W&B where the settings name them. Nothing is left behind; with
    --enable-s3-checkpoints an empty object is put into the bucket and deleted again. Exit code
    10: a run would fail.

    Examples:

        clipft doctor --model tiny
        clipft doctor --config clipft.toml
        clipft doctor --data-dir ./catalogue --scenario full --json
        clipft doctor --s3-bucket bucket --enable-s3-checkpoints
    """
    from clipft.doctor.examination import examine

    with out.progress("Looking at this machine") as report:
        findings = examine(loaded.values, report)
    errors = [name for name, finding in findings.items() if finding.status == "error"]
    checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    out.result({"ready": not errors, "checks": checks}, _table(findings))
    if errors:
        first = findings[errors[0]]
        error = NotReady(
            f"{counted(len(errors), 'check')} failed, first {errors[0]}: {first.found}", first.hint
        )
        print_error(error, as_json=False)  # stdout has the table already
        raise typer.Exit(error.exit_code)
    warnings = sum(finding.status == "warning" for finding in findings.values())
    remark = f", with {counted(warnings, 'warning')}" if warnings else ""
    out.note(f"Ready{remark}.")
    has_pairs = findings["pairs"].status == "ok"
    end(out, {}, () if not has_pairs else ("train", *flags_given(loaded), "--plan"))


def _table(findings: "dict[str, Finding]") -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in ("status", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    for name, finding in findings.items():
        said = Text(finding.found)
        if finding.hint:
            said.append(f"\n-> {finding.hint}")
        table.add_row(Text(finding.status, _COLOURS[finding.status]), name, said)
    return table
