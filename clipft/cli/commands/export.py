"""``clipft export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clipft.cli.console import Output, end
from clipft.cli.options import one_of, settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import UsageError, unknown_choice
from clipft.export.model_card import _Cards

if TYPE_CHECKING:
    from clipft.export.export import Written
    from clipft.runs.load import OpenedModel

CHOICES = ("transformers", "peft", "onnx", "sentence-transformers", "all")
Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="Run folder (its best epoch), checkpoint, or any model that --model takes",
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to make; an earlier export is replaced")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help=f"{'|'.join(CHOICES)}; all: a folder each, in OUT",
        rich_help_panel="Export",
        autocompletion=one_of(CHOICES),
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="REPO",
        help="Then upload it to this repository of the hub; a new one is made private "
        "[default: none]",
        show_default=False,
        rich_help_panel="Export",
    ),
]


@settings_command("data_dir", "model", *LOCATION_SETTINGS)
def export(
    loaded: LoadedSettings,
    out: Output,
    place: Model,
    target: Out,
    kind: Format = "transformers",
    push: Push = None,
) -> None:
    """Hand a tuned model to other libraries, with a model card.

    transformers: all weights, adapters merged in; peft: the adapter alone; onnx: both encoders,
    checked with onnxruntime on pairs of --data-dir where it is given; sentence-transformers: for
    its encode(). Weights are safetensors.

    Examples:

        clipft export ./checkpoints/dual_lora ./my-clip
        clipft export ./checkpoints/dual_lora ./onnx --format onnx
        clipft export ./checkpoints/dual_lora ./all --format all --push me/my-clip
    """
    if kind not in CHOICES:
        raise UsageError(
            f"--format {kind}: {unknown_choice(kind, CHOICES)}", "as in --format transformers"
        )
    from clipft.cli.s3_checkpoints import local_model
    from clipft.export.export import Export, check_target, chosen_formats, make_repository
    from clipft.export.export import push as upload
    from clipft.models.huggingface import has_adapter
    from clipft.runs.load import open_model

    check_target(target)
    bring_named_data(loaded, out)
    place = local_model(place, loaded.values, out)
    opened = open_model(place, _on_cpu(loaded), ("model", "device", "precision"))
    formats = chosen_formats(kind, has_adapter(opened.loaded.model), opened.settings.scenario)
    if kind == "all" and "peft" not in formats:
        out.note(f"No peft: {opened.settings.scenario} trains no adapter.")
    repository = make_repository(push) if push else None
    data_given = loaded.origins["data_dir"] != "default"
    checked_on = opened.settings.model_copy(update={"data_dir": loaded.values.data_dir})
    job = Export(
        opened, target, formats, _Cards(opened), out.note, checked_on if data_given else None
    )
    written = job.write()
    page = upload(target, repository) if repository else None
    out.result(_result(opened, written, page), _table(written, page))
    data_dir = (checked_on if data_given else opened.settings).data_dir
    folder = next(iter(written.folders.values()))
    end(out, {"model card": folder / "README.md"}, _following(written, data_dir))


def _on_cpu(loaded: LoadedSettings) -> LoadedSettings:
    """Weights are written, not trained: fp32 on the CPU, wherever they came from."""
    values = loaded.values.model_copy(update={"device": "cpu", "precision": "fp32"})
    return LoadedSettings(values, {**loaded.origins, "device": "command", "precision": "command"})


def _result(opened: "OpenedModel", written: "Written", page: str | None) -> dict[str, Any]:
    return {
        "folders": {name: str(folder) for name, folder in written.folders.items()},
        "base_model": opened.loaded.base.name,
        "scenario": opened.settings.scenario,
        "checkpoint": str(opened.checkpoint) if opened.checkpoint else None,
        "onnx_check": written.onnx.to_dict() if written.onnx else None,
        "pushed_to": page,
    }


def _table(written: "Written", page: str | None) -> Table:
    table = Table(title="Exported", title_justify="left", show_header=False)
    for name, folder in written.folders.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        table.add_row(name, str(folder), f"{size / 2**20:.1f} MiB")
    if written.onnx:
        worst = max(written.onnx.image_difference, written.onnx.text_difference)
        table.add_row(
            "onnx against torch", f"{worst:.1e} at most", counted(written.onnx.pairs, "pair")
        )
    if page:
        table.add_row("pushed to", page, "")
    return table


def _following(written: "Written", data_dir: Path) -> tuple[object, ...]:
    """To search with the model, where one was written that ``search`` opens."""
    whole = written.folders.get("transformers") or written.folders.get("sentence-transformers")
    return ("search", whole, data_dir, "what you look for") if whole else ()
