"""``clipft evaluate``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS
from clipft.config.settings import Settings
from clipft.config.sources import JUDGED_ANEW, LoadedSettings

if TYPE_CHECKING:
    from clipft.evaluation.compare import Evaluated


from clipft.cli.options import flags_given
from clipft.cli.s3_data import bring_named_data
from clipft.config.settings import ZERO_SHOT_LINEAR_PAIRS, ZERO_SHOT_TEMPLATES

EVALUATION_SETTINGS = (*JUDGED_ANEW, *LOCATION_SETTINGS)
_PANEL = "Kept ability"

Place = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint, or run folder (its best epoch), or s3://bucket/prefix "
        "[default: the scenario's run in --output-dir]",
        show_default=False,
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        "--keep",
        metavar="DATA",
        help="A second, general data set: what did tuning cost there?",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Interpolate = Annotated[
    str | None,
    typer.Option(
        "--interpolate",
        metavar="0:1:0.1",
        help="Measure at points between the untouched (0) and the tuned (1) weights: "
        "START:STOP:STEP, or values with commas",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
SaveInterpolated = Annotated[
    tuple[float, Path] | None,
    typer.Option(
        "--save-interpolated",
        metavar="ALPHA FILE",
        help="Write the weights at one point as a checkpoint, for evaluate and export",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


@settings_command(*EVALUATION_SETTINGS, "model", "scenario", "output_dir")
def evaluate(
    loaded: LoadedSettings,
    out: Output,
    checkpoint: Place = None,
    keep: Keep = None,
    interpolate: Interpolate = None,
    save_interpolated: SaveInterpolated = None,
) -> None:
    """Measure a tuned model beside the untouched one.

    Retrieval of pairs and of groups, in both directions, and by category, with 95 % intervals
    of both models and of their difference.

    With --keep the same on a general set. With --interpolate at points between the untouched
    and the tuned weights; with a run folder as CHECKPOINT both are also written into it, as
    kept.json and interpolation.json.

    Examples:

        clipft evaluate ./checkpoints/dual_lora --data-dir ./catalogue
        clipft evaluate ./checkpoints/dual_lora_checkpoint.pt --json
        clipft evaluate --keep ./general --interpolate 0:1:0.1
        clipft evaluate --save-interpolated 0.6 ./dual_lora_0.6.pt
        clipft evaluate s3://bucket/checkpoints --data-dir s3://bucket/catalogue
    """
    from clipft.api import evaluate as evaluate_place
    from clipft.cli.s3_checkpoints import fetched_checkpoint
    from clipft.cli.s3_data import bring_named_data
    from clipft.evaluation.compare import Request

    bring_named_data(loaded, out)
    place = fetched_checkpoint(checkpoint, loaded.values, out)
    alpha, file = save_interpolated or (None, None)
    request = Request.of(keep, interpolate, alpha, file)
    judged = evaluate_place(place, loaded, request, out.note)
    if checkpoint and checkpoint.is_dir():
        judged.found.write(checkpoint, judged.settings)
    out.result(judged.to_dict(), *_shown(judged.found, judged.settings))
    weights = {f"weights at {alpha:g}": file} if file else {}
    end(out, weights, ("export", file or checkpoint or judged.checkpoint, "./my-clip"))


def _shown(found: "Evaluated", settings: Settings) -> Iterator[Any]:
    from clipft.cli.tables import (
        UNCLEAR,
        category_table,
        comparison_tables,
        definitions,
        headline,
        sweep_table,
    )

    compared = found.comparison.to_dict()
    yield from comparison_tables("Validation", compared)
    by_category = category_table(compared)
    if by_category:
        yield by_category
    if found.keep:
        yield from comparison_tables("Kept ability", found.keep.to_dict())
    if found.points:
        points = [point.to_dict() for point in found.points]
        yield sweep_table(points, found.best_alpha)
        loss = " without a clear loss on the kept set" if found.keep else ""
        yield f"Most recall{loss}: alpha {found.best_alpha:g}"
    yield definitions(compared)
    if found.comparison.after:
        yield UNCLEAR
    yield headline(compared)


_PANEL_zero_shot = "Classification"
_SETTINGS = (*EVALUATION_SETTINGS, "model", "max_train_pairs", "seed")

Tuned = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Classify with this checkpoint or run folder [default: the untouched --model]",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="A,B|FILE",
        help="Labels, with commas between or one a line in a file [default: those in the metadata]",
        show_default=False,
        rich_help_panel=_PANEL_zero_shot,
    ),
]
Templates = Annotated[
    str,
    typer.Option(
        "--templates",
        metavar="general|furniture|FILE",
        help="Prompts, each with {} for the label; a file has one a line",
        rich_help_panel=_PANEL_zero_shot,
    ),
]
LinearPairs = Annotated[
    int,
    typer.Option(
        "--linear-pairs",
        metavar="N",
        min=0,
        help="Labelled training pairs at most for a linear classifier on the frozen features, "
        "the point of reference; 0: none",
        rich_help_panel=_PANEL_zero_shot,
    ),
]
SaveClassifier = Annotated[
    Path | None,
    typer.Option(
        "--save-classifier",
        metavar="FILE",
        help="Write the labels' vectors as safetensors",
        show_default=False,
        rich_help_panel=_PANEL_zero_shot,
    ),
]


@settings_command(*_SETTINGS)
def zero_shot(
    loaded: LoadedSettings,
    out: Output,
    checkpoint: Tuned = None,
    labels: Labels = None,
    templates: Templates = ZERO_SHOT_TEMPLATES,
    linear_pairs: LinearPairs = ZERO_SHOT_LINEAR_PAIRS,
    save_classifier: SaveClassifier = None,
) -> None:
    """Measure a model as it is: retrieval and classification.

    The untouched model, or a checkpoint. It classifies by prompts over the labels; beside it
    stands a linear classifier that learns from labelled training pairs.

    Examples:

        clipft zero-shot --data-dir ./catalogue
        clipft zero-shot --model tiny --labels chair,table,lamp --label-field type
        clipft zero-shot ./checkpoints/dual_lora --save-classifier my.safetensors
    """
    from clipft.cli.s3_checkpoints import fetched_checkpoint
    from clipft.core.files import check_writable
    from clipft.evaluation.evaluator import Comparison, EvaluationSet
    from clipft.evaluation.zero_shot import LabelSource, classifier_of, label_validation
    from clipft.evaluation.zero_shot import save_classifier as save
    from clipft.runs.load import open_model

    bring_named_data(loaded, out)
    if save_classifier:
        check_writable(save_classifier)
    checkpoint = fetched_checkpoint(checkpoint, loaded.values, out)
    place = str(checkpoint) if checkpoint else None
    opened = open_model(place, loaded, _SETTINGS)
    settings, model, path = opened.settings, opened.loaded, opened.checkpoint
    pairs = EvaluationSet.open(model.base.inputs, settings)
    judged = pairs.judge(model)
    source = LabelSource(labels, templates, linear_pairs)
    labelling = label_validation(model, pairs, judged.embedded, source)
    found = labelling.to_dict(settings) if labelling else None
    compared = Comparison(judged.evaluation, None).to_dict()
    figures = judged.embedded.retrieval(settings.evaluation_bytes).to_dict()
    result = {
        **figures,
        "model": settings.model,
        "checkpoint": path,
        "evaluation": compared,
        "classification": found,
    }
    out.result(result, *_shown_zero_shot(compared, found, settings))
    if not labelling:
        field = settings.label_field
        out.note(f"No pair has one of the labels as its {field!r}: no classification.")
    elif save_classifier:
        save(save_classifier, classifier_of(model, labelling, path))
    end(out, {"classifier": save_classifier if labelling else None}, _following(loaded, place))


def _shown_zero_shot(
    compared: dict[str, Any], classified: dict[str, Any] | None, settings: Settings
) -> Iterator[Any]:
    from clipft.cli.tables import (
        classification_table,
        comparison_tables,
        confused_table,
        definitions,
    )

    name = settings.scenario if settings.declared_scenario.trains else "untouched"
    yield from comparison_tables("Validation", compared, name)
    if classified:
        yield classification_table(f"Classification by {settings.label_field}", classified)
        if classified["confused"]:
            yield confused_table(classified["confused"])
    yield definitions(compared)


def _following(loaded: LoadedSettings, place: str | None) -> tuple[object, ...]:
    """After the untouched model comes the run that should be better; after a tuned one nothing."""
    if place:
        return ()
    return ("train", "--data-dir", loaded.values.data_dir, *flags_given(loaded, "model"), "--plan")
