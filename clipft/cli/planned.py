"""``clipft train --plan``: what would happen, and nothing of it."""

from typing import TYPE_CHECKING

from clipft.cli.console import Output
from clipft.cli.ending import end
from clipft.cli.options import flags_given
from clipft.cli.s3_data import bring_data, bring_validation, stream_source
from clipft.runs.records import Forecast
from clipft.reporting.forecast_table import forecast_table
from clipft.cli.progress import plan_lines
from clipft.config.settings import Settings, StorageSettings
from clipft.config.sources import LoadedSettings
from clipft.storage.sync.sync import SyncOptions, SyncResult
from clipft.distributed.collectives import Processes, by_first, on_each_machine
from clipft.training.forecast import forecast
from clipft.words import counted

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


def plan_in(processes: Processes, loaded: LoadedSettings, out: Output) -> None:
    """Show what the run would do and take. Pairs that are still in a bucket are counted, not
    fetched; there are no steps to measure then."""
    settings = loaded.values
    to_fetch = by_first(processes, lambda: _to_fetch(settings, out))
    if to_fetch and to_fetch.transferred:
        count, size = to_fetch.transferred, to_fetch.bytes / 2**20
        out.result(
            {"to_fetch": {"objects": count, "bytes": to_fetch.bytes}, "forecast": None},
            f"{counted(count, 'object')}, {size:,.1f} MiB, would be fetched to "
            f"{settings.data_dir} first; only then can the rest be foreseen.",
        )
        names = tuple(StorageSettings.model_fields)
        end(out, {}, ("sync", *flags_given(loaded, *names)))
        return
    source = _stream(processes, settings, out)
    foreseen = forecast(settings, out.note, processes, out.progress, source)
    _show(foreseen, settings, out)
    end(out, {}, ("train", *flags_given(loaded)))


def _to_fetch(settings: Settings, out: Output) -> SyncResult | None:
    if not settings.s3_bucket or settings.stream:
        return None
    return bring_data(settings, out, SyncOptions(dry_run=True))


def _stream(processes: Processes, settings: Settings, out: Output) -> "ShardSource | None":
    if not settings.s3_bucket or not settings.stream:
        return None
    source = stream_source(settings, out)
    on_each_machine(processes, lambda: bring_validation(settings, out))
    return source


def _show(foreseen: Forecast, settings: Settings, out: Output) -> None:
    place = None
    if settings.enable_s3_checkpoints:
        place = f"s3://{settings.s3_bucket}/{settings.s3_checkpoint_prefix.strip('/')}"
    data = {"forecast": foreseen.to_dict(), "uploads_to": place, "to_fetch": None}
    shown = forecast_table(foreseen, str(settings.output_dir), place)
    out.result(data, *plan_lines(foreseen.plan), shown)
