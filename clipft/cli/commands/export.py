"""``clipft export``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data
from clipft.config.fields import Section, setting
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted
from clipft.core.errors import UsageError
from clipft.export.target import Format

if TYPE_CHECKING:
    from rich.table import Table

    from clipft.export.export import Written
    from clipft.export.reduce import Reduced
    from clipft.export.towers import TowerCheck


class ExportOptions(Section):
    title = "Export"
    format: Literal[Format, "all"] = setting(
        "transformers",
        "Format to write: transformers, peft, onnx, openvino, coreml, sentence-transformers or "
        "open_clip. all: every format whose packages are installed, each in a subfolder of OUT.",
        metavar="FORMAT",
    )
    precision: Literal["fp32", "fp16", "int8"] = setting(
        "fp32",
        "Precision of onnx, openvino and coreml: fp32, fp16 (half the size) or int8 (a quarter of "
        "it). The loss of R@10 is measured on the pairs of --data-dir.",
    )
    max_loss: float | None = setting(
        None,
        "Export nothing if the precision costs more than this in R@10, the mean of both "
        "directions.",
        unit="points",
        ge=0,
    )
    push: str | None = setting(
        None,
        "Upload the result to this repository of the Hugging Face Hub. A new repository is "
        "private.",
        metavar="REPO",
    )


Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="Run folder (its best epoch), checkpoint, or any model that --model accepts.",
    ),
]
Target = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder to write to. An earlier export in it is replaced."),
]


@command("data_dir", "model", *LOCATION_SETTINGS, options=ExportOptions)
def export(
    place: Source, target: Target, loaded: LoadedSettings, options: ExportOptions, out: Output
) -> None:
    """Export a model for other libraries, with a model card.

    transformers: the whole model with adapters merged in; peft: the adapter alone; onnx, openvino
    and coreml: both encoders, compared with PyTorch on pairs of --data-dir if it is given;
    sentence-transformers: a model for its encode(); open_clip: a folder that open_clip opens as
    local-dir:OUT. Weights are stored as safetensors.

    Examples:

        clipft export ./checkpoints/dual_lora ./my-clip
        clipft export ./checkpoints/dual_lora ./web --format onnx --precision int8
        clipft export ./checkpoints/dual_lora ./all --format all --push me/my-clip
    """
    data_given = loaded.origins["data_dir"] != "default"
    _check_precision(options, data_given)
    from clipft.cli.preflight import check_place, import_libraries
    from clipft.cli.s3_checkpoints import local_model
    from clipft.export.target import check_target, chosen_formats, unfit_for

    check_target(target)
    place = local_model(place, loaded.values, out)
    # Weights are copied, not trained: fp32 on the CPU, whatever they were trained with
    on_cpu = loaded.values.model_copy(update={"device": "cpu", "precision": "fp32"})
    origins = {**loaded.origins, "device": "command", "precision": "command"}
    overrides = ("model", "device", "precision")
    now = LoadedSettings(on_cpu, origins)
    checked = check_place(place, now, overrides)
    if checked:
        chosen_formats(options.format, unfit_for(checked))
    bring_named_data(loaded, out)
    import_libraries()
    from clipft.export.export import RuntimeChoices, export_model, unfit_formats
    from clipft.runs.load import open_model
    from clipft.storage.hub import make_repository, push

    opened = open_model(place, now, overrides)
    scenario = opened.settings.scenario
    formats, skipped = chosen_formats(options.format, unfit_formats(opened))
    for name, why in skipped.items():
        out.note(f"The {name} format is skipped: {why}.")
    # Made before the export, so that a missing permission shows before the work
    repository = make_repository(options.push, "model") if options.push else None
    checked_on = opened.settings.model_copy(update={"data_dir": loaded.values.data_dir})
    choices = RuntimeChoices(
        options.precision, options.max_loss, checked_on if data_given else None
    )
    written = export_model(opened, target, formats, out.note, choices)
    page = push(target, repository, "model") if repository else None
    result = {
        "folders": {name: str(folder) for name, folder in written.folders.items()},
        "base_model": opened.loaded.base.name,
        "scenario": scenario,
        "checkpoint": str(opened.checkpoint) if opened.checkpoint else None,
        **_of_runtimes("check", written.checks),
        **_of_runtimes("precision", written.reduced),
        "open_clip_difference": written.open_clip,
        "pushed_to": page,
    }
    out.result(result, _table(written, page))

    folder = next(iter(written.folders.values()))
    data_dir = (checked_on if data_given else opened.settings).data_dir
    # `clipft search` opens these two formats
    whole = written.folders.get("transformers") or written.folders.get("sentence-transformers")
    following = ("search", whole, data_dir, "what you are looking for")
    end(out, {"model card": folder / "README.md"}, following if whole and data_dir.exists() else ())


def _table(written: "Written", page: str | None) -> "Table":
    from clipft.cli.plain_table import rows_table

    rows = []
    for name, folder in written.folders.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        rows.append([name, str(folder), f"{size / 2**20:.1f} MiB"])
    for name, check in written.checks.items():
        pairs = counted(check.pairs, "pair")
        rows.append([f"difference between {name} and torch", f"{check.worst:.1e} at most", pairs])
        if "not run" in check.checked_with:
            rows.append([f"{name} was checked with", check.checked_with, ""])
        if name in written.reduced:
            rows += _precision_rows(written.reduced[name])
    if written.open_clip is not None:
        found = f"{written.open_clip:.1e} at most"
        rows.append(["difference between open_clip and torch", found, ""])
    if page:
        rows.append(["pushed to", page, ""])
    return rows_table("Exported", ["", ""], rows, texts={0})


def _of_runtimes(what: str, found: "Mapping[str, TowerCheck | Reduced]") -> dict[str, Any]:
    """Return what was found of each runtime; None for those that were not written."""
    from clipft.export.target import RUNTIME_PACKAGES

    return {
        f"{name}_{what}": found[name].to_dict() if name in found else None
        for name in RUNTIME_PACKAGES
    }


def _precision_rows(reduced: "Reduced") -> list[list[str]]:
    rows = []
    for kind, tower in reduced.towers.items():
        found = f"{tower.megabytes[1]:.1f} MB instead of {tower.megabytes[0]:.1f}"
        if tower.milliseconds:
            found += f", {tower.milliseconds[1]:.2f} ms instead of {tower.milliseconds[0]:.2f}"
        cosine = f"cosine {tower.cosine:.4f} at least"
        rows.append([f"{kind}, {tower.precision}", found, cosine])
    if recall := reduced.recall:
        found = (
            f"{recall['after']:.1f} instead of {recall['before']:.1f}, difference "
            f"{recall['difference']:+.1f} [{recall['low']:+.1f}, {recall['high']:+.1f}]"
        )
        rows.append(["R@10", found, counted(reduced.pairs, "pair")])
    return rows


def _check_precision(options: ExportOptions, data_given: bool) -> None:
    """Refuse a precision that would be ignored, or a limit that cannot be measured.

    Raises:
        UsageError: one of them is.
    """
    from clipft.export.target import RUNTIME_PACKAGES

    if options.precision != "fp32" and options.format not in {*RUNTIME_PACKAGES, "all"}:
        raise UsageError(
            f"--precision {options.precision} is only for {', '.join(RUNTIME_PACKAGES)}",
            "add --format onnx, or leave it out",
        )
    if options.max_loss is not None and (options.precision == "fp32" or not data_given):
        raise UsageError(
            "--max-loss needs a --precision below fp32 and pairs to measure on",
            "add --precision int8 --data-dir DIR",
        )
