"""``clipft evaluate`` and ``clipft zero-shot``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipft.cli.answers import FigureOptions, comparison_answer, footnotes, say_more
from clipft.cli.console import Output, end
from clipft.cli.options import command, flags_given
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data
from clipft.config.fields import setting
from clipft.config.settings import EVALUATION_OVERRIDES, Settings
from clipft.config.sources import LoadedSettings

if TYPE_CHECKING:
    from clipft.evaluation.compare import Evaluated


class Details(FigureOptions):
    split: Literal["auto", "test", "val"] = setting(
        "auto",
        "Pairs to measure on. auto: the test pairs if there are any, otherwise the validation "
        "pairs.",
    )


class EvaluateOptions(Details):
    title = "Evaluation"
    keep: Path | None = setting(
        None,
        "A general set: other pairs, to measure what the model lost by fine-tuning.",
        metavar="DATA",
    )
    interpolate: str | None = setting(
        None,
        "Evaluate at points between the pretrained (0) and the fine-tuned (1) weights, given as "
        "START:STOP:STEP or as values separated by commas.",
        metavar="0:1:0.1",
    )
    frontier: tuple[Path, ...] = setting(
        (),
        "Another run of the same pretrained model, such as one trained with --preserve. Its gain "
        "and its loss on the general set are compared with those of --interpolate. May be "
        "repeated.",
        metavar="RUN",
    )
    save_interpolated: tuple[float, Path] | None = setting(
        None,
        "Write the weights at one point as a checkpoint, for evaluate and export.",
        metavar="ALPHA FILE",
    )


@command(
    *EVALUATION_OVERRIDES,
    *LOCATION_SETTINGS,
    "model",
    "scenario",
    "output_dir",
    options=EvaluateOptions,
)
def evaluate(
    loaded: LoadedSettings,
    options: EvaluateOptions,
    out: Output,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoint, run folder (its best epoch), or s3://bucket/prefix. Default: the "
            "scenario's run in --output-dir.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare a fine-tuned model with its pretrained model.

    Shows the main figures of retrieval with 95% intervals. --all shows every figure: both
    directions, for single pairs, for groups of pairs and by category.

    Measures on the test pairs if there are any, because the best epoch was chosen on the validation
    pairs; otherwise on the validation pairs. --keep measures the same on a general set.
    --interpolate measures points between the pretrained and the fine-tuned weights, always on the
    validation pairs. If CHECKPOINT is a run folder, these results are also saved in it, as
    kept.json and interpolation.json.

    Examples:

        clipft evaluate ./checkpoints/dual_lora --data-dir ./catalogue
        clipft evaluate ./checkpoints/dual_lora_checkpoint.pt --json
        clipft evaluate --keep ./general --interpolate 0:1:0.1
        clipft evaluate --keep general --interpolate 0.5 --frontier w10/dual_lora
        clipft evaluate --save-interpolated 0.6 ./dual_lora_0.6.pt
        clipft evaluate s3://bucket/checkpoints --data-dir s3://bucket/catalogue
    """
    from clipft.cli.preflight import check_evaluation, import_libraries
    from clipft.cli.s3_checkpoints import fetched_checkpoint
    from clipft.evaluation.request import Request

    alpha, file = options.save_interpolated or (None, None)
    request = Request.of(
        options.keep, options.interpolate, alpha, file, options.split, options.frontier
    )
    place = fetched_checkpoint(checkpoint, loaded.values, out)
    check_evaluation(place, loaded, request)
    bring_named_data(loaded, out)
    import_libraries()
    from clipft.api import evaluate as evaluate_place

    evaluated = evaluate_place(place, loaded, request, out.note)
    if checkpoint and checkpoint.is_dir():
        evaluated.found.write(checkpoint, evaluated.settings)
    out.result(evaluated.to_dict(), *_answer(evaluated.found, options))
    has_report = checkpoint is not None and (checkpoint / "report.html").is_file()
    say_more(out, options, report="gains and losses" if has_report else "")
    weights = {f"weights at {alpha:g}": file} if file else {}
    # A checkpoint in a bucket was fetched, and the next command can use the local copy
    local = checkpoint if checkpoint and checkpoint.exists() else evaluated.checkpoint
    end(out, weights, ("export", file or local, "./my-clip"))


def _answer(found: "Evaluated", options: Details) -> Iterator[Any]:
    from clipft.cli.tables import dimensions_table, sweep_table
    from clipft.evaluation.evaluator import SPLIT_TITLES
    from clipft.metrics.figures import GENERAL_SET, frontier_sentences

    compared = found.comparison.to_dict()
    general = found.keep.to_dict() if found.keep else None
    yield from comparison_answer(SPLIT_TITLES[found.split], compared, options, general)
    by_dimensions = dimensions_table(compared)
    if by_dimensions:
        yield by_dimensions
    if found.points:
        runs = [run.to_dict() for run in found.runs]
        yield sweep_table([point.to_dict() for point in found.points], found.best_alpha, runs)
        yield from frontier_sentences(runs)
        loss = f" without a clear loss on the {GENERAL_SET}" if found.keep else ""
        where = " on the validation pairs" if found.split == "test" else ""
        yield f"Highest mean recall{where}{loss}: alpha {found.best_alpha:g}"
    yield from footnotes(compared, options)


class ZeroShotOptions(Details):
    title = "Classification"
    labels: str | None = setting(
        None,
        "Labels, separated by commas or one per line in a file. Default: the labels in the "
        "metadata.",
        metavar="A,B|FILE",
    )
    templates: str = setting(
        "furniture",
        "Prompts with {} in place of the label: general, furniture, or a file with one per line.",
        metavar="general|furniture|FILE",
    )
    linear: bool = setting(
        False, "Also train a linear classifier on the features of labeled training images."
    )
    linear_pairs: int = setting(
        2000, "Maximum number of training pairs for the linear classifier.", ge=1
    )
    save_classifier: Path | None = setting(
        None, "Write the label embeddings to this safetensors file.", metavar="FILE"
    )


_ZERO_SHOT_SETTINGS = (
    *EVALUATION_OVERRIDES,
    *LOCATION_SETTINGS,
    "model",
    "max_train_pairs",
    "seed",
)


@command(*_ZERO_SHOT_SETTINGS, options=ZeroShotOptions)
def zero_shot(
    loaded: LoadedSettings,
    options: ZeroShotOptions,
    out: Output,
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoint, run folder or any model that --model accepts. Default: the "
            "pretrained --model.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Evaluate a single model: retrieval and classification.

    The model is the pretrained one, or a checkpoint. It classifies each image by comparing it with
    prompts for the labels. --linear shows a linear classifier for comparison.

    Examples:

        clipft zero-shot --data-dir ./catalogue
        clipft zero-shot --model tiny --labels chair,table,lamp --label-field type
        clipft zero-shot ./checkpoints/dual_lora --save-classifier my.safetensors
    """
    from clipft.cli.preflight import check_labels, check_place, import_libraries
    from clipft.cli.s3_checkpoints import local_model
    from clipft.core.files import check_writable
    from clipft.evaluation.labels import choose_labels

    if options.save_classifier:
        check_writable(options.save_classifier)
    place = local_model(place, loaded.values, out) if place else None
    checked = check_place(place, loaded, _ZERO_SHOT_SETTINGS)
    if checked:
        check_labels(options.labels, options.templates, checked, options.split)
    bring_named_data(loaded, out)
    import_libraries()
    from clipft.evaluation.evaluator import Comparison, EvaluationSet
    from clipft.evaluation.zero_shot import label_validation, save_classifier
    from clipft.runs.load import open_model

    opened = open_model(place, loaded, _ZERO_SHOT_SETTINGS)
    settings, model = opened.settings, opened.loaded
    for remark in model.base.remarks():
        out.note(remark)
    pairs = EvaluationSet.open(model.base.inputs, settings, options.split)
    chosen = choose_labels(options.labels, options.templates, pairs.labels, settings.label_field)
    for note in chosen.notes if chosen else ():
        out.note(f"note: {note}.")
    evaluated = pairs.evaluate(model)
    labelling = None
    if chosen:
        embedded = evaluated.embedded
        most = options.linear_pairs if options.linear else 0
        labelling = label_validation(model, pairs, embedded, chosen, most)
    compared = Comparison(evaluated.evaluation, None, pairs.caption).to_dict()
    classification = labelling.to_dict(settings) if labelling else None
    result = {
        **evaluated.evaluation.retrieval.to_dict(),
        "model": settings.model,
        "checkpoint": opened.checkpoint,
        "split": pairs.split,
        "evaluation": compared,
        "classification": classification,
    }
    out.note(f"Evaluated on the {pairs.title.lower()} pairs of {settings.data_dir}.")
    shown = _single_model(pairs.title, compared, classification, settings, options)
    out.result(result, *shown)
    say_more(out, options)
    if not labelling:
        field = settings.label_field
        why = "no image with a label can be used" if chosen else f"no pair has a field {field!r}"
        out.note(f"No classification: {why}. Name the field with the labels with --label-field.")
    elif options.save_classifier:
        save_classifier(options.save_classifier, model, labelling, opened.checkpoint)
    made = {"classifier": options.save_classifier if labelling else None}
    data = loaded.values.data_dir
    # After the pretrained model comes the run that should improve on it
    trainable = place is None and (data / "train").is_dir()
    following = ("train", "--data-dir", data, *flags_given(loaded, "model"), "--plan")
    end(out, made, following if trainable else ())


def _single_model(
    title: str,
    compared: dict[str, Any],
    classification: dict[str, Any] | None,
    settings: Settings,
    options: Details,
) -> Iterator[Any]:
    from clipft.cli.tables import classification_table, confused_table

    name = settings.scenario if settings.declared_scenario.trains else "pretrained"
    yield from comparison_answer(title, compared, options, model=name)
    if classification:
        yield classification_table(f"Classification by {settings.label_field}", classification)
        confused = classification["confused"]
        if confused and options.all:
            yield confused_table(confused)
        elif confused:
            label, taken_for = confused[0]["label"], confused[0]["taken_for"]
            yield (
                f"Most frequent confusion: {label} is classified as {taken_for} "
                f"({confused[0]['share']:.0%} of its images)"
            )
    yield from footnotes(compared, options)
