"""``clipft zero-shot``."""

from typing import Annotated, Any

import typer
from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.evaluate import EVALUATION_SETTINGS
from clipft.cli.options import settings_command
from clipft.settings_sources import LoadedSettings

Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="A,B|FILE",
        help="Labels, with commas between or one a line in a file [default: those in the metadata]",
        show_default=False,
        rich_help_panel="Classification",
    ),
]
LabelField = Annotated[
    str,
    typer.Option(
        "--label-field",
        metavar="NAME",
        help="Field of the metadata that names the right label",
        rich_help_panel="Classification",
    ),
]
Templates = Annotated[
    str,
    typer.Option(
        "--templates",
        metavar="general|furniture|FILE",
        help="Prompts, each with {} for the label; a file has one a line",
        rich_help_panel="Classification",
    ),
]


@settings_command(*EVALUATION_SETTINGS, "model")
def zero_shot(
    loaded: LoadedSettings,
    out: Output,
    labels: Labels = None,
    label_field: LabelField = "category",
    templates: Templates = "furniture",
) -> None:
    """The untouched model: retrieval, and classification by prompts over the labels.

    Examples:

        clipft zero-shot --data-dir ./catalogue
        clipft zero-shot --model tiny --labels "chair,table,lamp" --label-field type
    """
    from clipft.reporting.tables import retrieval_table
    from clipft.training.labelling import LabelSource, classify_validation
    from clipft.training.loaded import load_model
    from clipft.training.measure import embed_validation, validation_pairs

    settings = loaded.values.model_copy(update={"scenario": "zero_shot"})
    untouched = load_model(settings)
    embedded = embed_validation(untouched, settings)
    source = LabelSource(labels, label_field, templates)
    pairs = validation_pairs(settings)
    classification = classify_validation(untouched, pairs, embedded, source)
    figures = embedded.retrieval(settings.evaluation_bytes).to_dict()
    shown: list[Any] = [retrieval_table("Validation", {settings.model: figures})]
    if classification:
        shown.append(_table(classification.to_dict(), label_field))
    else:
        out.note(f"No pair has a {label_field!r} in its metadata: no classification.")
    result = classification.to_dict() if classification else None
    out.result({**figures, "model": settings.model, "classification": result}, *shown)


def _table(figures: dict[str, Any], field: str) -> Table:
    title = f"Classification by {field} ({figures['images']} images, {figures['labels']} labels)"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("top-1", f"{figures['top1']:.1%}")
    if figures["top5"] is not None:
        table.add_row("top-5", f"{figures['top5']:.1%}")
    table.add_row("mean per-class recall", f"{figures['mean_per_class_recall']:.1%}")
    return table
