"""``clipft export``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clipft.cli.console import Output
from clipft.cli.ending import end
from clipft.cli.options import one_of, settings_command
from clipft.cli.s3_data import LOCATION_SETTINGS, bring_named_data
from clipft.core.errors import UsageError, unknown_choice
from clipft.config.sources import LoadedSettings
from clipft.words import counted

if TYPE_CHECKING:
    from clipft.export.onnx import OnnxCheck
    from clipft.export.model_card import CardFacts
    from clipft.export.export import Written
    from clipft.training.opened import OpenedModel

CHOICES = ("transformers", "peft", "onnx", "sentence-transformers", "all")
_ALWAYS_TOLD = frozenset(
    {"caption", "augmentation", "lora_r", "lora_alpha", "epochs", "effective_batch_size", "lr"}
)
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
    from clipft.models.huggingface import has_adapter
    from clipft.storage.hub import make_repository
    from clipft.storage.hub import push as upload
    from clipft.export.export import Export, check_target, chosen_formats
    from clipft.training.opened import open_model

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


class _Cards:
    """The card of each format; the model's facts are gathered once, before it is merged."""

    def __init__(self, opened: "OpenedModel") -> None:
        self._facts = _facts(opened)

    def __call__(self, kind: str, check: "OnnxCheck | None") -> str:
        from clipft.export.model_card import model_card

        return model_card(self._facts, kind, _checked(check) if kind == "onnx" else "")


def _checked(check: "OnnxCheck | None") -> str:
    if check is None:
        return ""
    return (
        f"Checked with onnxruntime against torch on {counted(check.pairs, 'pair')}: the "
        f"greatest difference of a component is {check.image_difference:.1e} for pictures and "
        f"{check.text_difference:.1e} for texts."
    )


def _facts(opened: "OpenedModel") -> "CardFacts":
    from clipft.models.huggingface import given_bias, hub_id, license_of, public_name
    from clipft.export.model_card import CardFacts
    from clipft.config.scenarios import SCENARIOS

    base, model = opened.loaded.base, opened.loaded.model
    moved = model.logit_scale.requires_grad or given_bias(model) is not None
    facts = CardFacts(
        base=public_name(base.name),
        base_id=hub_id(base.name),
        license=license_of(base.name),
        scenario=opened.settings.scenario,
        summary=SCENARIOS[opened.settings.scenario].summary,
        parameters=str(model.parameters_count()),
        image_size=base.inputs.image_size,
        context_length=base.inputs.context_length,
        logit_scale=model.logit_scale.item() if moved else None,
        logit_bias=given_bias(model),
    )
    return _with_history(facts, opened)


def _with_history(facts: "CardFacts", opened: "OpenedModel") -> "CardFacts":
    """What the checkpoint, and the evaluation beside it, tell of training and figures."""
    from clipft.export.model_card import figures_of

    if opened.content is None or opened.checkpoint is None:
        return facts
    content = opened.content
    before = content["before"]["retrieval"]
    best = content["best"]
    judged = _evaluation(opened.checkpoint) or {}
    told = _telling_settings(content["settings"])
    if "interpolated_at" in content:
        told["interpolated_at"] = content["interpolated_at"]
    return replace(
        facts,
        train_pairs=content.get("train_pairs"),
        val_pairs=before.get("pairs"),
        epoch=best["epoch"] if best else content["epoch"],
        settings=told,
        before=figures_of(judged.get("before") or before),
        after=figures_of(judged.get("after") or (best and best["retrieval"])),
    )


def _telling_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Those that decide the weights and say something: the usual ones, and what was changed."""
    from clipft.config.scenarios import SCENARIOS
    from clipft.config.settings import Settings, fixed_on_resume

    standard = Settings().model_dump(mode="json")
    told = [n for n in fixed_on_resume() if n in saved and n not in {"model", "scenario"}]
    if not SCENARIOS[saved["scenario"]].lora:
        told = [name for name in told if not name.startswith("lora_")]
    return {n: saved[n] for n in told if n in _ALWAYS_TOLD or saved[n] != standard[n]}


def _evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """The run's evaluation, which is of its best epoch."""
    from clipft.runs.folder import RunPaths

    paths = RunPaths.within(checkpoint.parent)
    path = paths.evaluation
    if checkpoint != paths.best or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
