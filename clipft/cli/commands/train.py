"""``clipft train``."""

from typing import Annotated

import typer

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.config.settings import SECTIONS
from clipft.config.sources import LoadedSettings

Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Say what would happen and what it would take, from some steps that are run and "
        "forgotten; start nothing",
        rich_help_panel="Plan",
    ),
]


@settings_command(*SECTIONS)
def train(ctx: typer.Context, loaded: LoadedSettings, out: Output, plan: Plan = False) -> None:
    """Fine-tune CLIP under one scenario and show the gain.

    The gain is that over the untouched model, on the validation pairs. With --s3-bucket the
    pairs are synced first. With --resume-from-checkpoint the run goes on from its checkpoint;
    if there is none it says so and starts at epoch 0.

    Examples:

        clipft train --scenario dual_lora --data-dir ./catalogue
        clipft train --data-dir ./catalogue --plan
        clipft train --scenario vision_lora --epochs 5 --effective-batch-size 256
        clipft train --processes 2 --data-dir ./catalogue
        clipft train --mini-train --model tiny --data-dir ./catalogue
    """
    from clipft.cli.planned import plan_in
    from clipft.cli.running import in_processes, train_in

    in_processes(plan_in if plan else train_in, loaded, out, ctx.obj)
