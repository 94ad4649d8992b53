"""``clipft report``."""

from pathlib import Path
from typing import Annotated

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.config.fields import File, Section, setting
from clipft.config.sources import LoadedSettings
from clipft.core.files import check_writable


class ReportOptions(Section):
    title = "Report"
    html: File | None = setting(
        None,
        "File to write the page to, with a JSON file of the same content beside it. Default: "
        "report.html in the folder.",
        metavar="FILE",
    )


@command("scenario", "output_dir", "data_dir", options=ReportOptions)
def report(
    loaded: LoadedSettings,
    options: ReportOptions,
    out: Output,
    place: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run or of an ablation. Default: the scenario's run in --output-dir.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about a run or an ablation.

    The page shows metrics, curves, a gallery and the settings, and needs no network. Every run
    and every ablation writes its own page at the end. Use this command to write it again, or to
    look at a run that is still in progress.

    Examples:

        clipft report ./checkpoints/dual_lora
        clipft report ./checkpoints/dual_lora --html dual_lora.html
    """
    from clipft.ablation.runner import STATE
    from clipft.runs.folder import run_settings

    folder = place or loaded.values.run_dir
    page = options.html or folder / "report.html"
    is_ablation = (folder / STATE).is_file()
    if not is_ablation:
        run_settings(folder)  # before check_writable, which makes the folder of the page
    check_writable(page)
    moved = loaded.values.data_dir if loaded.origins["data_dir"] != "default" else None
    if is_ablation:
        from clipft.ablation.page import write_ablation_report

        content = write_ablation_report(folder, page)
    else:
        from clipft.report.report import write_run_report

        content = write_run_report(folder, page, moved)
    out.result({**content, "page": str(page)})
    out.note(content["verdict"])
    if content.get("judgments"):
        out.note(content["judgments"]["sentence"])
    end(out, {"report": page, "the same as JSON": page.with_suffix(".json")})
