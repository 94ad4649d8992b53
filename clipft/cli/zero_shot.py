"""``clipft zero-shot``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.console import Output
from clipft.cli.ending import end
from clipft.cli.commands.evaluate import EVALUATION_SETTINGS
from clipft.cli.options import flags_given, settings_command
from clipft.cli.s3_data import bring_named_data
from clipft.config.settings import ZERO_SHOT_LINEAR_PAIRS, ZERO_SHOT_TEMPLATES, Settings
from clipft.config.sources import LoadedSettings

_PANEL = "Classification"
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
        rich_help_panel=_PANEL,
    ),
]
Templates = Annotated[
    str,
    typer.Option(
        "--templates",
        metavar="general|furniture|FILE",
        help="Prompts, each with {} for the label; a file has one a line",
        rich_help_panel=_PANEL,
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
        rich_help_panel=_PANEL,
    ),
]
SaveClassifier = Annotated[
    Path | None,
    typer.Option(
        "--save-classifier",
        metavar="FILE",
        help="Write the labels' vectors as safetensors",
        show_default=False,
        rich_help_panel=_PANEL,
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
    from clipft.training.classifier_file import classifier_of
    from clipft.training.classifier_file import save_classifier as save
    from clipft.evaluation.evaluator import Comparison, EvaluationSet
    from clipft.evaluation.zero_shot import LabelSource, label_validation
    from clipft.training.opened import open_model, open_untouched

    bring_named_data(loaded, out)
    if save_classifier:
        check_writable(save_classifier)
    checkpoint = fetched_checkpoint(checkpoint, loaded.values, out)
    place = str(checkpoint) if checkpoint else None
    opened = open_model(place, loaded, _SETTINGS) if place else open_untouched(loaded.values)
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
    out.result(result, *_shown(compared, found, settings))
    if not labelling:
        field = settings.label_field
        out.note(f"No pair has one of the labels as its {field!r}: no classification.")
    elif save_classifier:
        save(save_classifier, classifier_of(model, labelling, path))
    end(out, {"classifier": save_classifier if labelling else None}, _following(loaded, place))


def _shown(
    compared: dict[str, Any], classified: dict[str, Any] | None, settings: Settings
) -> Iterator[Any]:
    from clipft.reporting.evaluation_tables import (
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
