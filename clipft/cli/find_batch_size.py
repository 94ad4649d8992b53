"""``clipft find-batch-size``."""

from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.options import settings_command
from clipft.settings import ModelSettings
from clipft.settings_sources import LoadedSettings

_GIB = 2**30


@settings_command(ModelSettings, "effective_batch_size", "precision", "device", "seed")
def find_batch_size(loaded: LoadedSettings, out: Output) -> None:
    """Find the micro-batch that fits this machine and is fastest for the scenario.

    Tries real training passes. `train` does the same when --micro-batch-size is 0, and
    takes what was found here.

    Examples:

        clipft find-batch-size --scenario dual_lora
        clipft find-batch-size --scenario full --effective-batch-size 4096 --json
    """
    from clipft.training.batch_size import Probe
    from clipft.training.loaded import load_model
    from clipft.training.setup import find_micro_batch

    settings = loaded.values
    effective = settings.effective_batch_size
    model = load_model(settings)

    def report(probe: Probe) -> None:
        text = f"{probe.pairs_per_s(effective):.1f} pairs/s" if probe.fits else "does not fit"
        out.note(f"micro-batch {probe.size}: {text}, {probe.peak_bytes / _GIB:.2f} GiB")

    found = find_micro_batch(settings, model, effective, report)
    table = Table(title=f"{settings.scenario} on {settings.model}", title_justify="left")
    for heading in ("micro-batch", "fits", "pairs/s", "peak GiB"):
        table.add_column(heading, justify="right")
    for probe in sorted(found.probes, key=lambda probe: probe.size):
        speed = f"{probe.pairs_per_s(effective):.1f}" if probe.fits else ""
        memory = f"{probe.peak_bytes / _GIB:.2f}" if probe.fits else ""
        table.add_row(str(probe.size), "yes" if probe.fits else "no", speed, memory)
    out.result({"micro_batch_size": found.chosen, **found.to_dict()}, table)
    how = "by extrapolation" if found.extrapolated else "tried"
    out.note(f"Largest that fits {found.usable_bytes / _GIB:.1f} GiB: {found.largest} ({how}).")
    out.note(f"Chosen for speed: {found.chosen}. `clipft train` takes it from here.")
