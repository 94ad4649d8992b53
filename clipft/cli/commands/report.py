"""``clipft report``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import settings_command
from clipft.config.sources import LoadedSettings
from clipft.core.files import check_writable

Place = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        help="Folder of a run or of an ablation [default: the scenario's run in --output-dir]",
        show_default=False,
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        dir_okay=False,
        metavar="FILE",
        help="The page; the same as JSON is written beside it [default: report.html in the folder]",
        show_default=False,
        rich_help_panel="Report",
    ),
]


@settings_command("scenario", "output_dir", "data_dir")
def report(loaded: LoadedSettings, out: Output, place: Place = None, html: Html = None) -> None:
    """Make one page of a run or an ablation.

    Figures, curves, gallery and settings. The page needs no network. Each run and ablation
    writes its own at its end; this makes it anew, also of a run that is still under way.

    Examples:

        clipft report ./checkpoints/dual_lora
        clipft report ./checkpoints/dual_lora --html dual_lora.html
    """

    folder = place or loaded.values.run_dir
    page = html or folder / "report.html"
    check_writable(page)
    moved = loaded.values.data_dir if loaded.origins["data_dir"] != "default" else None
    content = write_report(folder, page, moved)
    out.result({**content, "page": str(page)})
    out.note(content["verdict"])
    end(out, {"report": page, "the same as JSON": page.with_suffix(".json")})


def write_report(folder: Path, page: Path, data_dir: Path | None) -> dict[str, Any]:
    """Write the page of a run or of an ablation, whichever ``folder`` holds."""
    from clipft.ablation.page import write_ablation_report
    from clipft.ablation.runner import STATE
    from clipft.report.report import write_run_report

    if (folder / STATE).is_file():
        return write_ablation_report(folder, page)
    return write_run_report(folder, page, data_dir)
