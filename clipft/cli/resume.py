"""``clipft resume``."""

from pathlib import Path
from typing import Annotated

import typer

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.core.errors import UsageError
from clipft.s3_url import parse_s3_url
from clipft.config.settings import Settings, fixed_on_resume
from clipft.config.sources import LoadedSettings

_FREE = set(Settings.model_fields) - {*fixed_on_resume(), "resume_from_checkpoint"}

Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint of the run, its folder, or s3://bucket/prefix "
        "[default: the newest in --output-dir]",
        show_default=False,
    ),
]


@settings_command(*_FREE)
def resume(
    ctx: typer.Context, loaded: LoadedSettings, out: Output, checkpoint: Checkpoint = None
) -> None:
    """Go on with a run that was stopped.

    It ends where it would have ended without the stop. The settings come from the checkpoint.
    Only those listed here may be changed: the others decide the weights.

    Examples:

        clipft resume
        clipft resume ./checkpoints/dual_lora
        clipft resume ./checkpoints/dual_lora_checkpoint.pt --num-workers 8
        clipft resume s3://bucket/checkpoints --endpoint-url http://localhost:9000
    """
    from clipft.cli.s3_checkpoints import fetch_place
    from clipft.cli.running import in_processes, train_in
    from clipft.training.checkpoint_pair import newest_whole
    from clipft.runs.load import resumable_checkpoint, saved_settings

    url = parse_s3_url(checkpoint) if checkpoint else None
    now = loaded.values
    if url:
        path = fetch_place(url, now, now.output_dir, out)
    else:
        path = resumable_checkpoint(checkpoint, now.output_dir)
    saved = saved_settings(newest_whole(path).content, loaded, _FREE)
    settings = saved.model_copy(update={"output_dir": path.parent, "resume_from_checkpoint": True})
    if path != settings.checkpoint_path:
        raise UsageError(
            f"{path} is not the checkpoint of a run in its place: a run goes on in its own folder",
            f"name the run's {settings.scenario}_checkpoint.pt (best.pt holds weights alone)",
        )
    origins = dict.fromkeys(Settings.model_fields, "checkpoint")
    in_processes(train_in, LoadedSettings(settings, origins), out, ctx.obj)
