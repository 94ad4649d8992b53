"""``clipft find-batch-size``."""

from typing import TYPE_CHECKING

from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.ending import end
from clipft.cli.options import flags_given, settings_command
from clipft.config.settings import ModelSettings, Settings
from clipft.config.sources import LoadedSettings

if TYPE_CHECKING:
    from clipft.training.batch_size import Found, Probe

_GIB = 2**30


@settings_command(ModelSettings, "effective_batch_size", "precision", "device", "seed")
def find_batch_size(loaded: LoadedSettings, out: Output) -> None:
    """Find the micro-batch that fits and is fastest here.

    Tries real training passes. `train` does the same when --micro-batch-size is 0, and
    takes what was found here for the same --effective-batch-size.

    Examples:

        clipft find-batch-size --scenario dual_lora
        clipft find-batch-size --scenario full --effective-batch-size 4096 --json
    """
    from clipft.embedding.load import load_model
    from clipft.training.plan import find_micro_batch

    settings = loaded.values
    effective = settings.effective_batch_size

    def search(wanted: Settings) -> "Found":
        how = ", gradient checkpointing" if wanted.gradient_checkpointing else ""

        def report(probe: "Probe") -> None:
            text = f"{probe.pairs_per_s(effective):.1f} pairs/s" if probe.fits else "does not fit"
            out.note(f"micro-batch {probe.size}{how}: {text}, {probe.peak_bytes / _GIB:.2f} GiB")

        return find_micro_batch(wanted, load_model(wanted), effective, report)

    found = search(settings)
    tight = found.largest < effective and found.kept < 1
    lean = settings.model_copy(update={"gradient_checkpointing": True})
    other = search(lean) if tight and not settings.gradient_checkpointing else None
    results = {"micro_batch_size": found.chosen, **found.to_dict()}
    if other:
        results["with_gradient_checkpointing"] = other.to_dict()
    tables = [_table(found, effective, f"{settings.scenario} on {settings.model}")]
    tables += [_table(other, effective, "with --gradient-checkpointing")] if other else []
    out.result(results, *tables)
    how = "by extrapolation" if found.extrapolated else "tried"
    out.note(f"Largest that fits {found.usable_bytes / _GIB:.1f} GiB: {found.largest} ({how}).")
    out.note(
        f"Chosen for speed: {found.chosen}, which leaves {found.left_bytes / _GIB:.1f} GiB; "
        f"a run of the same model, scenario and effective batch takes it by itself."
    )
    if other and other.speed(effective) > found.speed(effective):
        out.note(f"Faster with --gradient-checkpointing, micro-batches of {other.chosen}.")
    following = ("train", *flags_given(loaded), "--plan")
    end(out, {}, following if settings.data_dir.exists() else ())


def _table(found: "Found", effective: int, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("micro-batch", "fits", "pairs/s", "peak GiB"):
        table.add_column(heading, justify="right")
    for probe in sorted(found.probes, key=lambda probe: probe.size):
        speed = f"{probe.pairs_per_s(effective, found.kept):.1f}" if probe.fits else ""
        memory = f"{probe.peak_bytes / _GIB:.2f}" if probe.fits else ""
        table.add_row(str(probe.size), "yes" if probe.fits else "no", speed, memory)
    return table
