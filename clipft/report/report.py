"""Collects the content of a run's report, and writes the files of ``train`` and ``report``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.metrics.figures import DIRECTIONS, figure_tables, mean_recall, verdict
from clipft.runs.records import RunRecords

if TYPE_CHECKING:
    from clipft.config.settings import Settings

Json = Mapping[str, Any]

_POINTS = 500
"""Most points in a curve over steps."""


def write_run_report(folder: Path, page: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Write the report of a run as ``page`` and as JSON beside it; return its content.

    Args:
        folder: the run folder.
        page: the HTML file to write.
        data_dir: where the pairs are now, if they have been moved.

    Raises:
        UsageError: ``folder`` holds no run.
        StorageError: the page cannot be written.
    """
    from clipft.report.html import write_page_and_json
    from clipft.report.run_page import run_page
    from clipft.runs.folder import read_run, run_settings

    records, settings = read_run(folder), run_settings(folder)
    if data_dir:
        settings = settings.model_copy(update={"data_dir": data_dir})
    gallery = _gallery(folder, settings)
    content = run_content(records, gallery)
    write_page_and_json(page, run_page(content, gallery.images), content)
    return content


@dataclass(frozen=True)
class Gallery:
    """Examples from the rankings of a run.

    ``images`` are JPEGs by pair number. ``note`` is the reason if there are no examples, else "".
    """

    cases: Sequence[Json] = ()
    lookup: Json | None = None
    mistaken: Sequence[Json] = ()
    images: Mapping[int, bytes] = field(default_factory=dict)
    note: str = ""


def _gallery(folder: Path, settings: "Settings") -> Gallery:
    from clipft.core.errors import DataError
    from clipft.data.captions.metadata import describe
    from clipft.data.captions.template import CaptionTemplate
    from clipft.data.shards.folders import validation_pairs
    from clipft.evaluation.gallery import (
        PairReader,
        Rankings,
        all_cases,
        choose_cases,
        choose_to_look_up,
        data_name,
        gallery_content,
        lookup_content,
        mistaken_categories,
    )
    from clipft.report.html import SIDE, thumbnail
    from clipft.runs.folder import RunPaths

    paths = RunPaths(folder)
    before, after = Rankings.read(paths.rankings_before), Rankings.read(paths.rankings_best)
    if before is None:
        return Gallery(note="No gallery: the run kept no rankings.")
    images: dict[int, bytes] = {}
    places: dict[int, str] = {}
    try:
        pairs = validation_pairs(settings)
        if data_name(pairs) != before.data:
            moved = f"the pairs in {settings.data_dir} are not those of the run"
            return Gallery(note=f"No gallery: {moved}.")
        template = CaptionTemplate.of(settings)
        read = PairReader(pairs, template.for_evaluation())

        def keep_image(number: int) -> str:
            if number not in places:
                places[number], image = read.image(number, at_least=SIDE)
                if image:
                    images[number] = thumbnail(image)
            return places[number]

        cases = all_cases(before, after)
        said = describe(pairs, template, settings.label_field, None)
        return Gallery(
            cases=gallery_content(choose_cases(before, after), read, keep_image),
            lookup=lookup_content(choose_to_look_up(cases), read, keep_image),
            mistaken=mistaken_categories(cases, [pair.label for pair in said]),
            images=images,
        )
    except DataError as error:
        return Gallery(note=f"No gallery: {error.message}.")


def run_content(records: RunRecords, gallery: Gallery) -> dict[str, Any]:
    """Return the content of report.json from the records in a run folder."""
    kept = records.kept
    settings = {entry["name"]: entry["value"] for entry in records.settings}
    tables = figure_tables(records.epochs, records.evaluation)
    return {
        "kind": "run",
        "format_version": 1,
        "title": f"{settings['scenario']} on {settings['model']}",
        "folder": records.folder,
        "finished": records.result is not None,
        "verdict": _verdict(records, tables),
        "plan": records.run.get("plan"),
        "seconds": records.run.get("seconds"),
        "device_hours": records.run.get("device_hours"),
        "cost": records.run.get("cost"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
        "environment": records.run.get("environment", {}),
        "figures": tables,
        "steps": step_curves(records.steps),
        "epochs": epoch_curves(records.epochs),
        "categories": _categories(records.evaluation),
        "interpolation": records.interpolation,
        # Only the paired figures of the general pairs are shown
        "kept": {"keep_dir": kept["keep_dir"], "figures": figure_tables([], kept)[:1]}
        if kept
        else None,
        "judgments": records.judgments.to_dict() if records.judgments.judged else None,
        "gallery": list(gallery.cases),
        "gallery_note": gallery.note,
        "lookup": gallery.lookup,
        "mistaken": list(gallery.mistaken),
        "skipped": {"counts": records.skipped_counts, "listed": records.skipped},
        "settings": records.settings,
    }


def _categories(evaluation: Json | None) -> list[dict[str, Any]]:
    """Return text-to-image R@10 of each category, the largest category first."""
    if not evaluation:
        return []

    def r10(model: str, category: str) -> Any:
        found = (evaluation[model] or {}).get("by_category", {}).get(category)
        return found["paired"]["text_to_image"]["figures"]["r@10"] if found else None

    return [
        {
            "name": name,
            "pairs": category["pairs"],
            "before": r10("before", name),
            "after": r10("after", name),
        }
        for name, category in evaluation["before"]["by_category"].items()
    ]


def _verdict(records: RunRecords, tables: Sequence[Json]) -> str:
    """Return a sentence about the result of the run, the same as in ``clipft evaluate``."""
    if not tables:
        return "The pretrained model has not been measured yet."
    recall = tables[0]["rows"][0]
    last, ended = records.epochs[-1]["epoch"], records.result is not None
    if not recall["after"]:
        return f"{verdict(recall)} {'Nothing was trained.' if ended else 'No epoch has ended yet.'}"
    best = [epoch["epoch"] for epoch in records.epochs if epoch["improved"]][-1:] or [last]
    of = f"of {last}" if ended else f"of {last} so far"
    return f"{verdict(recall)} The best epoch is {best[0]} {of}."


def step_curves(steps: Sequence[Json]) -> dict[str, Any]:
    """Return curves over the steps as lists of equal length, at most 500 points long.

    For a longer run, each point averages ``averaged`` consecutive steps.

    Args:
        steps: the lines of metrics.jsonl with kind ``step``.
    """

    def mean(part: Sequence[Json], name: str) -> float | None:
        values = [record[name] for record in part if record.get(name) is not None]
        return sum(values) / len(values) if values else None

    def ratio(part: Sequence[Json], over: str, under: str) -> float:
        return float(sum(r[over] for r in part) / max(1e-9, sum(r[under] for r in part)))

    size = max(1, -(-len(steps) // _POINTS))
    parts = [steps[at : at + size] for at in range(0, len(steps), size)]
    return {
        "averaged": size,
        "step": [part[-1]["step"] for part in parts],
        "loss": [mean(part, "loss") for part in parts],
        "lr": [mean(part, "lr") for part in parts],
        "pairs_per_s": [ratio(part, "pairs", "seconds") for part in parts],
        "data_wait": [ratio(part, "data_seconds", "seconds") for part in parts],
    }


def epoch_curves(epochs: Sequence[Json]) -> dict[str, Any]:
    """Return curves over the epochs as lists of equal length; epoch 0 is the pretrained model.

    Args:
        epochs: the lines of metrics.jsonl with kind ``epoch``.
    """
    curves: dict[str, Any] = {
        name: [epoch[name] for epoch in epochs]
        for name in ("epoch", "step", "train_loss", "val_loss")
    }
    curves["mean_recall"] = [mean_recall(epoch["retrieval"]) for epoch in epochs]
    for direction in DIRECTIONS:
        for name in ("r@1", "r@10"):
            values = [epoch["retrieval"][direction][name] for epoch in epochs]
            curves[f"{direction}_{name}"] = values
    return curves
