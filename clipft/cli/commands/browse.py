"""``clipft browse`` and ``clipft report``: the pages of a run."""

import secrets
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, local_data
from clipft.config.fields import File, Section, setting
from clipft.config.sources import LoadedSettings
from clipft.core.common import shell_command
from clipft.core.errors import DataError, UsageError, sentences
from clipft.core.files import check_writable, did_you_mean_path

if TYPE_CHECKING:
    from clipft.config.settings import Settings

_OVERRIDES = ("num_workers", "precision", "device", "caption", "caption_lines")
"""Settings that this command may set; the others come from the run."""
_NEEDED = ("starlette", "uvicorn")


class BrowseOptions(Section):
    title = "Browse"
    top: int = setting(8, "Number of images that each model shows.", metavar="K", ge=1, le=200)
    port: int = setting(
        0, "Port of the page on this machine; 0 takes a free one.", metavar="PORT", ge=0, le=65535
    )
    no_open: bool = setting(False, "Print the address of the page, but open no browser.")


@command(*_OVERRIDES, *LOCATION_SETTINGS, options=BrowseOptions)
def browse(
    place: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder; the best epoch is used.")
    ],
    loaded: LoadedSettings,
    options: BrowseOptions,
    out: Output,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Folder of images or of shards; train/ and val/ are searched as well. Default: "
            "the data of the run.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Search with both models of a run, and judge them blind.

    Opens a page in the browser that searches the images by words or by a picture, with the
    pretrained and the fine-tuned model, and marks what only one of them finds. Judged blind, the
    two lists appear as A and B in random order; the run folder keeps the result. Only this machine
    can reach the page. Ctrl-C or closing the terminal ends it.

    Examples:

        clipft browse ./checkpoints/dual_lora
        clipft browse ./checkpoints/dual_lora ./other-photos --top 12
        clipft browse ./checkpoints/dual_lora --no-open --port 8000
    """
    _check_installed()
    from clipft.browse.server import HOST, bind, open_browser, serve
    from clipft.cli.preflight import check_place, import_libraries
    from clipft.data.captions.metadata import check_fields
    from clipft.data.captions.template import CaptionTemplate
    from clipft.runs.folder import RunPaths, read_run, run_settings
    from clipft.search.images import JoinedParts, open_images

    settings = run_settings(place)
    if settings.scenario == "zero_shot":
        raise UsageError(
            f"the run in {place} has no fine-tuned model to compare with",
            "choose the run of another scenario",
        )
    data = local_data(data or _images_of(settings, place), loaded.values, out)
    parts = open_images(data)
    if loaded.origins["caption"] != "default":
        check_fields(CaptionTemplate.parse(loaded.values.caption), JoinedParts(parts))
    check_place(str(place), loaded, _OVERRIDES)
    listener = bind(options.port)
    import_libraries()
    from clipft.browse.app import Subject, make_app
    from clipft.browse.comparison import open_comparison
    from clipft.browse.judging import Judging, held_out_numbers
    from clipft.report.report import Gallery, run_content
    from clipft.runs.load import open_model

    opened = open_model(str(place), loaded, _OVERRIDES)
    comparison = open_comparison(opened, parts, options.top, out.progress)
    assert opened.content, "the model of a run comes from a checkpoint"
    held_out, images = held_out_numbers(parts, data), len(comparison.images)
    queries, judgments = held_out or range(images), RunPaths(place).judgments
    judging = Judging(comparison, judgments, opened.content["epoch"], data, queries)
    subject = Subject(
        title=f"{settings.scenario} on {settings.model}",
        run=str(place),
        verdict=run_content(read_run(place), Gallery())["verdict"],
        images=images,
        held_out=len(held_out),
        examples=comparison.examples(queries),
    )
    token, ticket = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
    origin = f"http://{HOST}:{listener.getsockname()[1]}"
    url = f"{origin}/{token}/"
    app = make_app(token, ticket, subject, comparison, judging)
    shown = f"Open {url}\nOnly this machine can reach it. Press Ctrl-C to end it."
    out.result({"url": url, "images": images, "judgments": str(judgments)}, shown)

    def open_page() -> None:
        if not open_browser(f"{origin}/{ticket}"):
            out.note("note: no browser was found here; open the address yourself.")

    if not options.no_open:
        # Some browsers return only when they are closed, and the page is served meanwhile
        threading.Thread(target=open_page, daemon=True).start()
    serve(app, listener)
    out.note(judging.tally.sentence())


def _images_of(settings: "Settings", run: Path) -> Path:
    """Return the folder of images that a run was trained on.

    Raises:
        DataError: It is not there; a relative path may lead elsewhere from another folder.
    """
    folder = settings.data_dir
    if folder.is_dir():
        return folder
    relative = "" if folder.is_absolute() else "go to the folder where it was trained, or"
    raise DataError(
        f"the run was trained on {folder}, which does not exist here",
        sentences(
            did_you_mean_path(folder),
            relative,
            f"name the folder of its images: `{shell_command('browse', run, 'DATA')}`",
        ),
    )


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"clipft browse needs {' and '.join(missing)}",
            "install them: pip install 'clipft[browse]', or pipx inject clipft "
            + " ".join(missing),
        )


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
