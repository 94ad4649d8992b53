"""``clipft evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.settings_sources import LoadedSettings

EVALUATION_SETTINGS = (
    "data_dir",
    "caption",
    "num_workers",
    "max_val_pairs",
    "max_bad",
    "micro_batch_size",
    "precision",
    "device",
)

Place = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="Checkpoint, or run folder (its best epoch) "
        "[default: the scenario's run in --output-dir]",
        show_default=False,
    ),
]


@settings_command(*EVALUATION_SETTINGS, "model", "scenario", "output_dir")
def evaluate(loaded: LoadedSettings, out: Output, checkpoint: Place = None) -> None:
    """Retrieval of a checkpoint on the validation pairs: recall, median rank, MRR.

    R@K is the share of queries whose own partner is among the first K; equal scores rank by
    position.

    Examples:

        clipft evaluate ./checkpoints/dual_lora --data-dir ./catalogue
        clipft evaluate ./checkpoints/dual_lora_checkpoint.pt --json
    """
    from clipft.reporting.tables import retrieval_table
    from clipft.training.checkpoint import load_checkpoint
    from clipft.training.measure import embed_validation
    from clipft.training.restore import find_checkpoint, load_tuned, saved_settings

    path = find_checkpoint(checkpoint, loaded.values)
    content = load_checkpoint(path)
    settings = saved_settings(content, loaded, (*EVALUATION_SETTINGS, "model"))
    tuned = load_tuned(content, settings)
    figures = embed_validation(tuned, settings).retrieval(settings.evaluation_bytes).to_dict()
    out.note(f"{settings.scenario} on {settings.model}, weights of {path}.")
    out.result(
        {**figures, "scenario": settings.scenario, "checkpoint": str(path)},
        retrieval_table("Validation", {settings.scenario: figures}),
    )
