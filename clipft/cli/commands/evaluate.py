"""``clipft evaluate``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipft.cli.console import Output
from clipft.cli.ending import end
from clipft.cli.options import settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS
from clipft.config.settings import Settings
from clipft.config.sources import JUDGED_ANEW, LoadedSettings

if TYPE_CHECKING:
    from clipft.evaluation.compare import Evaluated

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
    from clipft.reporting.evaluation_tables import (
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
