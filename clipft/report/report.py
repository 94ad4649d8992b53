"""Making a run's report: what ``train``, ``ablate`` and ``report`` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipft.config.settings import Settings
from collections.abc import Mapping, Sequence

from clipft.core.files import write_json
from clipft.metrics.figures import before_and_after, figure_tables, mean_recall
from clipft.report.curves import epoch_curves, step_curves
from clipft.runs.records import RunRecords


def write_page_and_json(page: Path, html: str, content: dict[str, Any]) -> None:
    """Write a page, and its content as JSON beside it."""
    from clipft.report.html import write_page

    write_page(page, html)
    write_json(page.with_suffix(".json"), content, indent=1, ascii_only=False)


def write_run_report(folder: Path, page: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Write ``page`` and its content as JSON beside it; returns the content.

    ``data_dir``: where the pairs are now, if not where they were.

    Raises:
        UsageError: no run is there.
        StorageError: the page cannot be written.
    """
    from clipft.report.run_page import run_page
    from clipft.runs.folder import read_run, run_settings

    records, settings = read_run(folder), run_settings(folder)
    if data_dir:
        settings = settings.model_copy(update={"data_dir": data_dir})
    cases, pictures, note = _gallery(folder, settings)
    content = run_content(records, cases, note)
    write_page_and_json(page, run_page(content, pictures), content)
    return content


def _gallery(
    folder: Path, settings: "Settings"
) -> tuple[list[dict[str, Any]], dict[int, bytes], str]:
    """Cases, thumbnails by pair, and why there are none."""
    from clipft.core.errors import DataError
    from clipft.data.captions.template import CaptionTemplate
    from clipft.embedding.embed import validation_pairs
    from clipft.evaluation.gallery import (
        PairReader,
        Rankings,
        choose_cases,
        data_name,
        gallery_content,
    )
    from clipft.report.html import SIDE, thumbnail
    from clipft.runs.folder import RunPaths

    paths = RunPaths(folder)
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


def run_content(
    records: RunRecords, gallery: Sequence[Mapping[str, Any]], gallery_note: str
) -> dict[str, Any]:
    """JSON values alone. ``gallery_note`` says why there is no gallery, or is empty."""
    return {
        "kind": "run",
        "format_version": 1,
        "title": f"{records.setting('scenario')} on {records.setting('model')}",
        "folder": records.folder,
        "finished": records.result is not None,
        "verdict": _verdict(records, *_recall(records)),
        "plan": records.run.get("plan"),
        "seconds": records.run.get("seconds"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
        "environment": records.run.get("environment", {}),
        "figures": figure_tables(records.epochs, records.evaluation),
        "steps": step_curves(records.steps),
        "epochs": epoch_curves(records.epochs),
        "categories": _categories(records.evaluation),
        "interpolation": records.interpolation,
        "kept": _kept(records.kept),
        "gallery": list(gallery),
        "gallery_note": gallery_note,
        "skipped": {"counts": records.skipped_counts, "listed": records.skipped},
        "settings": records.settings,
    }


def _categories(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """R@10 from text to image of each category, the largest first."""
    if not evaluation:
        return []

    def figure(part: str, name: str) -> Any:
        of = (evaluation[part] or {}).get("by_category", {}).get(name)
        return of["paired"]["text_to_image"]["figures"]["r@10"] if of else None

    before = evaluation["before"]["by_category"]
    return [
        {
            "name": name,
            "pairs": category["pairs"],
            "before": figure("before", name),
            "after": figure("after", name),
        }
        for name, category in before.items()
    ]


def _kept(kept: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The paired figures on the general pairs."""
    if not kept:
        return None
    return {"keep_dir": kept["keep_dir"], "figures": figure_tables([], kept)[:1]}


def _recall(records: RunRecords) -> tuple[float | None, float | None]:
    """Mean recall before and after, as the tables below have it."""
    if records.evaluation:
        before, after = records.evaluation["before"], records.evaluation["after"]
        return before["recall"], after["recall"] if after else None
    parts = before_and_after(records.epochs)
    untouched, tuned = (mean_recall(part) if part else None for part in parts)
    return untouched, tuned


def _verdict(records: RunRecords, before: float | None, after: float | None) -> str:
    if before is None:
        return "The untouched model has not been measured yet."
    untouched = f"{100 * before:.1f} %"
    last = records.epochs[-1]["epoch"]
    if after is None:
        why = "no epoch was better" if last else "nothing was trained"
        return f"Mean recall of the untouched model {untouched}; {why}."
    gain = 100 * (after - before)
    best = next((e["epoch"] for e in reversed(records.epochs) if e["improved"]), last)
    end = f"epoch {best} of {last}" + ("" if records.result else " so far")
    advice = "" if gain > 0 else " No gain over the untouched model."
    around = _around(records.evaluation)
    return (
        f"Mean recall {untouched} before, {100 * after:.1f} % after "
        f"({gain:+.1f} points{around}) at {end}.{advice}"
    )


def _around(evaluation: Mapping[str, Any] | None) -> str:
    """The interval of the gain in words."""
    change = ((evaluation or {}).get("difference") or {}).get("recall") or {}
    if change.get("low") is None:
        return ""
    words = f", 95 % interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"
    return words if change["clear"] else f"{words}: it may be chance"
