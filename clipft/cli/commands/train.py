"""``clipft train``, ``clipft resume`` and ``clipft find-batch-size``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipft.cli.answers import FigureOptions
from clipft.cli.console import Output, end
from clipft.cli.options import command, flags_given
from clipft.config.fields import setting
from clipft.config.sections.model import ModelSettings
from clipft.config.settings import FOLLOWING, SECTIONS, Settings, fixed_on_resume
from clipft.config.sources import LoadedSettings, parse_s3_url
from clipft.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.training.finder.batch_size import Probe, SearchResult

_GIB = 2**30


class TrainOptions(FigureOptions):
    plan: bool = setting(
        False,
        "Show what the run would do, and how much time, memory and disk it would need. Measures a "
        "few steps, and keeps nothing.",
    )


@command(*SECTIONS, options=TrainOptions)
def train(ctx: typer.Context, loaded: LoadedSettings, options: TrainOptions, out: Output) -> None:
    """Fine-tune CLIP with one scenario and show the gain.

    The gain is measured against the pretrained model, on the validation pairs. With
    --s3-bucket the pairs are synced first. With --resume-from-checkpoint the run continues from
    its checkpoint; without a checkpoint it starts at epoch 0 and says so.

    Examples:

        clipft train --scenario dual_lora --data-dir ./catalogue
        clipft train --data-dir ./catalogue --plan
        clipft train --scenario vision_lora --epochs 5 --effective-batch-size 256
        clipft train --processes 2 --data-dir ./catalogue
        clipft train --mini-train --model tiny --data-dir ./catalogue
    """
    from clipft.cli.preflight import check_training

    check_training(loaded.values, list(filter(loaded.is_default, FOLLOWING)), options.plan)
    _start(loaded, out, ctx.obj, options, options.plan)


def _start(
    loaded: LoadedSettings,
    out: Output,
    args: Sequence[str],
    options: FigureOptions,
    plan: bool = False,
) -> None:
    """Train, or show the plan; with ``--processes N`` in N processes that run ``clipft ARGS``."""
    from clipft.cli.launch import launch_processes
    from clipft.cli.preflight import import_libraries

    if launch_processes(loaded.values.processes, args):
        return
    import_libraries()
    from clipft.cli.running import plan_training, run_training

    if plan:
        plan_training(loaded, out)
    else:
        run_training(loaded, out, options)


_FREE = set(Settings.model_fields) - {*fixed_on_resume(), "resume_from_checkpoint"}


@command(*_FREE, options=FigureOptions)
def resume(
    ctx: typer.Context,
    loaded: LoadedSettings,
    options: FigureOptions,
    out: Output,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoint of the run, its folder, or s3://bucket/prefix. Default: the newest "
            "checkpoint in --output-dir.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Continue a run that was stopped.

    The run ends exactly as it would have ended without the stop. Its settings come from the
    checkpoint. Only the settings listed here can be changed, because all others affect the
    resulting weights.

    Examples:

        clipft resume
        clipft resume ./checkpoints/dual_lora
        clipft resume ./checkpoints/dual_lora_checkpoint.pt --num-workers 8
        clipft resume s3://bucket/checkpoints --endpoint-url http://localhost:9000
    """
    from clipft.cli.preflight import check_training
    from clipft.cli.s3_checkpoints import fetch_place
    from clipft.runs.checkpoint import check_checkpoint, load_newest
    from clipft.runs.places import resumable_checkpoint, saved_settings

    url = parse_s3_url(checkpoint) if checkpoint else None
    now = loaded.values
    if url:
        path = fetch_place(url, now, now.output_dir, out)
    else:
        path = resumable_checkpoint(checkpoint, now.output_dir)
    content = load_newest(path, check_checkpoint).content or load_newest(path).content
    saved = saved_settings(content, loaded, _FREE)
    settings = saved.model_copy(update={"output_dir": path.parent, "resume_from_checkpoint": True})
    if path != settings.checkpoint_path:
        raise UsageError(
            f"{path} cannot be resumed: a run can only continue in its own folder, from its own "
            "checkpoint",
            f"name the run's {settings.scenario}_checkpoint.pt (best.pt contains only weights)",
        )
    check_training(settings)
    origins = dict.fromkeys(Settings.model_fields, "checkpoint")
    _start(LoadedSettings(settings, origins), out, ctx.obj, options)


@command(ModelSettings, "data_dir", "effective_batch_size", "precision", "device", "seed")
def find_batch_size(loaded: LoadedSettings, out: Output) -> None:
    """Find the fastest micro-batch size that fits in memory.

    Measures real training passes. `train` does the same if --micro-batch-size is 0, and reuses
    the result of this command for the same effective batch: the one that suits the pairs in
    --data-dir, unless --effective-batch-size is set.

    Examples:

        clipft find-batch-size --scenario dual_lora --data-dir ./catalogue
        clipft find-batch-size --scenario full --effective-batch-size 4096 --json
    """
    from clipft.cli.preflight import import_libraries
    from clipft.data.shards.folders import shard_paths
    from clipft.models.source import check_model

    settings = loaded.values
    has_pairs = (settings.data_dir / "train").is_dir()
    named = not loaded.is_default("data_dir") and not settings.s3_bucket
    if named:  # a folder that was named must have pairs
        shard_paths(settings.data_dir / "train")
    check_model(settings.model)
    import_libraries()
    from clipft.embedding.load import load_model
    from clipft.training.defaults import follow_catalogue
    from clipft.training.plan import find_micro_batch

    if has_pairs or named:
        settings = follow_catalogue(loaded, lambda said: None).values
    effective = settings.effective_batch_size
    if effective != loaded.values.effective_batch_size:
        out.note(
            f"The effective batch is {effective}, which suits the pairs in {settings.data_dir}."
        )

    def search(wanted: Settings) -> "SearchResult":
        how = ", gradient checkpointing" if wanted.gradient_checkpointing else ""

        def report(probe: "Probe") -> None:
            text = f"{probe.pairs_per_s(effective):.1f} pairs/s" if probe.fits else "does not fit"
            out.note(f"micro-batch {probe.size}{how}: {text}, {probe.peak_bytes / _GIB:.2f} GiB")

        return find_micro_batch(wanted, load_model(wanted), effective, report)

    found = search(settings)
    results = {"micro_batch_size": found.chosen, **found.to_dict()}
    tables = [_table(found, effective, f"{settings.scenario} on {settings.model}")]
    other = None
    # If memory is short, gradient checkpointing may be faster, because larger micro-batches fit
    if found.largest < effective and found.kept < 1 and not settings.gradient_checkpointing:
        other = search(settings.model_copy(update={"gradient_checkpointing": True}))
        results["with_gradient_checkpointing"] = other.to_dict()
        tables.append(_table(other, effective, "with --gradient-checkpointing"))
    out.result(results, *tables)
    how = "extrapolated" if found.extrapolated else "measured"
    out.note(
        f"The largest micro-batch that fits {found.usable_bytes / _GIB:.1f} GiB is "
        f"{found.largest} ({how})."
    )
    out.note(
        f"The fastest is {found.chosen}, which leaves {found.left_bytes / _GIB:.1f} GiB free. Runs "
        "with the same model, scenario and effective batch use it automatically."
    )
    if other and other.speed(effective) > found.speed(effective):
        out.note(f"--gradient-checkpointing is faster, with a micro-batch of {other.chosen}.")
    following = ("train", *flags_given(loaded), "--plan")
    end(out, {}, following if has_pairs else ())


def _table(found: "SearchResult", effective: int, title: str) -> "Table":
    from clipft.cli.plain_table import rows_table

    rows = [
        [
            f"{probe.size:,}",
            "yes" if probe.fits else "no",
            f"{probe.pairs_per_s(effective, found.kept):.1f}" if probe.fits else "",
            f"{probe.peak_bytes / _GIB:.2f}" if probe.fits else "",
        ]
        for probe in sorted(found.probes, key=lambda probe: probe.size)
    ]
    return rows_table(title, ["fits", "pairs/s", "peak GiB"], rows, label="micro-batch")
