"""Making a run's report: what ``train``, ``ablate`` and ``report`` share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipft.config.settings import Settings


def write_report(folder: Path, page: Path, data_dir: Path | None) -> dict[str, Any]:
    """Of a run's folder or an ablation's, as the two below."""
    from clipft.training.ablation_state import STATE

    if (folder / STATE).is_file():
        return write_ablation_report(folder, page)
    return write_run_report(folder, page, data_dir)


def write_ablation_report(folder: Path, page: Path) -> dict[str, Any]:
    """Write ``page`` and its content as JSON beside it; returns the content.

    Raises:
        UsageError: no ablation is there.
        StorageError: the page cannot be written.
    """
    from clipft.ablation.summary import ablation_content
    from clipft.ablation.page import ablation_page
    from clipft.training.ablation_state import read_state

    content = ablation_content(str(folder), read_state(folder))
    _write(page, ablation_page(content), content)
    return content


def _write(page: Path, html: str, content: dict[str, Any]) -> None:
    from clipft.report.html import write_page

    write_page(page, html)
    write_page(page.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_run_report(folder: Path, page: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Write ``page`` and its content as JSON beside it; returns the content.

    ``data_dir``: where the pairs are now, if not where they were.

    Raises:
        UsageError: no run is there.
        StorageError: the page cannot be written.
    """
    from clipft.reporting.run_content import run_content
    from clipft.report.run_page import run_page
    from clipft.training.run_reading import read_run, run_settings

    records, settings = read_run(folder), run_settings(folder)
    if data_dir:
        settings = settings.model_copy(update={"data_dir": data_dir})
    cases, pictures, note = _gallery(folder, settings)
    content = run_content(records, cases, note)
    _write(page, run_page(content, pictures), content)
    return content


def _gallery(
    folder: Path, settings: "Settings"
) -> tuple[list[dict[str, Any]], dict[int, bytes], str]:
    """Cases, thumbnails by pair, and why there are none."""
    from clipft.data.captions.template import CaptionTemplate
    from clipft.core.errors import DataError
    from clipft.report.html import SIDE, thumbnail
    from clipft.training.gallery import PairReader, choose_cases, gallery_content
    from clipft.training.measure import validation_pairs
    from clipft.evaluation.gallery import Rankings, data_name
    from clipft.runs.folder import RunPaths

    paths = RunPaths.within(folder)
    before, after = Rankings.read(paths.rankings_before), Rankings.read(paths.rankings_best)
    if before is None:
        return [], {}, "No gallery: the run kept no rankings."
    pictures: dict[int, bytes] = {}
    places: dict[int, str] = {}
    try:
        pairs = validation_pairs(settings)
        if data_name(pairs) != before.data:
            moved = f"the pairs in {settings.data_dir} are not those of the run"
            return [], {}, f"No gallery: {moved}."
        read = PairReader(pairs, CaptionTemplate.parse(settings.caption))

        def keep_picture(number: int) -> str:
            if number not in places:
                places[number], image = read.picture(number, at_least=SIDE)
                if image:
                    pictures[number] = thumbnail(image)
            return places[number]

        return gallery_content(choose_cases(before, after), read, keep_picture), pictures, ""
    except DataError as error:
        return [], {}, f"No gallery: {error.message}."
