"""The card (README.md) of an exported model: what it is, what it was made of, what it is worth.

The header is the hub's metadata (YAML); nothing in the card names a path of this machine.
"""

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.core.common import counted
from clipft.core.files import read_json
from clipft.metrics.figures import DIRECTIONS

if TYPE_CHECKING:
    from clipft.export.onnx import OnnxCheck
    from clipft.runs.load import OpenedModel

_PIPELINES = {
    "transformers": "zero-shot-image-classification",
    "peft": "zero-shot-image-classification",
    "onnx": "feature-extraction",
    "sentence-transformers": "sentence-similarity",
}
_FIGURES = (("R@1", "r@1"), ("R@5", "r@5"), ("R@10", "r@10"), ("median rank", "median_rank"))


@dataclass(frozen=True)
class Figure:
    """A figure, and its 95 % interval where one was taken."""

    value: float
    low: float | None = None
    high: float | None = None


Figures = Mapping[str, Mapping[str, Figure]]
"""Direction (``text_to_image``) -> name (``r@1``) -> figure."""


@dataclass(frozen=True)
class CardFacts:
    """All that a card can say. ``base_id`` is the base model's name on the hub, ``license``
    what its own card states; None: not known. ``logit_scale`` is set where it is not the base
    model's any more, ``logit_bias`` where the model's class has no place for the one learned."""

    base: str
    base_id: str | None
    license: str | None
    scenario: str
    summary: str
    parameters: str
    image_size: int
    context_length: int
    logit_scale: float | None = None
    logit_bias: float | None = None
    train_pairs: int | None = None
    val_pairs: int | None = None
    epoch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Figures | None = None
    after: Figures | None = None


def figures_of(retrieval: Mapping[str, Any] | None) -> Figures | None:
    """From a run's plain figures, or from those of an evaluation with intervals."""
    if not retrieval:
        return None
    paired = retrieval.get("paired", retrieval)
    found = {}
    for direction in DIRECTIONS:
        values = paired[direction].get("figures", paired[direction])
        found[direction] = {name: _figure(values[name]) for _, name in _FIGURES if name in values}
    return found


def _figure(value: Any) -> Figure:
    if isinstance(value, Mapping):
        return Figure(value["value"], value.get("low"), value.get("high"))
    return Figure(value)


def model_card(facts: CardFacts, kind: str, checked: str = "") -> str:
    """``kind`` is the format of the folder, "" for one that holds several; ``checked`` says
    how its ONNX towers were checked."""
    parts = [
        _header(facts, kind),
        f"# CLIP, {_title(facts)}\n",
        _about(facts),
        _use(facts, kind, checked),
        _training(facts),
        _figures(facts),
        _limits(facts),
        _license(facts),
    ]
    return "\n".join(part for part in parts if part)


def _title(facts: CardFacts) -> str:
    return f"{facts.base} fine-tuned" if facts.train_pairs or facts.settings else facts.base


def _header(facts: CardFacts, kind: str) -> str:
    from huggingface_hub import ModelCardData

    tags = ["clip", "clipft", "image-text-retrieval", *([kind] if kind else [])]
    data = ModelCardData(
        base_model=facts.base_id,
        library_name=kind or None,
        license=facts.license,
        pipeline_tag=_PIPELINES.get(kind),
        tags=sorted(set(tags)),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _about(facts: CardFacts) -> str:
    link = f"[{facts.base}](https://huggingface.co/{facts.base_id})"
    return (
        f"Base model: {link if facts.base_id else facts.base}. Scenario `{facts.scenario}`: "
        f"{facts.summary} ({facts.parameters}). It takes pictures of "
        f"{facts.image_size} x {facts.image_size} pixels and texts of at most "
        f"{facts.context_length} tokens, and gives one embedding for each; their cosine says how "
        f"well they go together. Made with clipft.\n"
    )


def _use(facts: CardFacts, kind: str, checked: str) -> str:
    if not kind:
        return "The model stands here in several formats, a folder each, with a card of its own.\n"
    source = files("clipft.export").joinpath("assets", f"use_{kind.replace('-', '_')}.py.txt")
    code = string.Template(source.read_text(encoding="utf-8")).safe_substitute(
        base=facts.base_id or f"PATH/TO/{facts.base}"
    )
    remarks = [f"## Use\n\n```python\n{code}```\n"]
    if kind == "peft" and facts.logit_scale is not None:
        remarks.append(
            "The temperature is not the base model's, and PEFT does not carry it. Cosines need "
            "none; for probabilities set it after loading: "
            f"`model.logit_scale.data.fill_({facts.logit_scale:.6f})`.\n"
        )
    if facts.logit_bias is not None:
        remarks.append(
            f"The sigmoid loss learned a bias of {facts.logit_bias:.6f}, which this model's class "
            "has no place for. A pair's probability is sigmoid(exp(logit_scale) * cosine + bias).\n"
        )
    if checked:
        remarks.append(f"{checked}\n")
    return "\n".join(remarks)


def _training(facts: CardFacts) -> str:
    if not facts.settings:
        return ""
    lines = ["## Training\n"]
    if facts.train_pairs:
        lines.append(f"- {facts.train_pairs:,} image-text pairs to train on")
    if facts.val_pairs:
        lines.append(f"- {facts.val_pairs:,} image-text pairs to validate on")
    if facts.epoch is not None:
        lines.append(f"- weights after epoch {facts.epoch}")
    lines += [f"- {name}: {_code(value)}" for name, value in facts.settings.items()]
    return "\n".join(lines) + "\n"


def _code(value: Any) -> str:
    """As code, whatever backticks it holds."""
    text = " ".join(str(value).split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _figures(facts: CardFacts) -> str:
    if not facts.before:
        return ""
    columns = [("untouched", facts.before)]
    if facts.after:
        columns.append(("this model", facts.after))
    lines = [
        "## Figures\n",
        f"Retrieval over {facts.val_pairs or 0:,} validation pairs. R@K is the share of queries "
        "whose own partner is among the first K; equal scores rank by position."
        + (" In brackets: 95 % intervals (bootstrap)." if _has_intervals(columns) else "")
        + "\n",
        "| | " + " | ".join(name for name, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for direction, label in DIRECTIONS.items():
        for shown, name in _FIGURES:
            cells = [_cell(figures[direction].get(name), name) for _, figures in columns]
            lines.append(f"| {label} {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _has_intervals(columns: Iterable[tuple[str, Figures]]) -> bool:
    found = (figure for _, sides in columns for side in sides.values() for figure in side.values())
    return any(figure.low is not None for figure in found)


def _cell(figure: Figure | None, name: str) -> str:
    if figure is None:
        return "-"

    def shown(value: float) -> str:
        return f"{100 * value:.1f} %" if name.startswith("r@") else f"{value:g}"

    interval = (
        ""
        if figure.low is None or figure.high is None
        else (f" ({shown(figure.low)} to {shown(figure.high)})")
    )
    return shown(figure.value) + interval


def _limits(facts: CardFacts) -> str:
    lines = ["## Limits\n"]
    if facts.settings:
        lines.append(
            "- The figures hold for pictures and texts like those of the validation pairs. What "
            "the base model knew of other subjects may have suffered: measure it before use there."
        )
    else:
        lines.append("- Untouched weights: nothing was measured for this card.")
    lines += [
        "- The biases of the base model, and of the pairs it was tuned on, are in it. It is not "
        "made to recognise or to judge people.",
        f"- Texts beyond {facts.context_length} tokens are cut.",
    ]
    return "\n".join(lines) + "\n"


def _license(facts: CardFacts) -> str:
    stated = (
        f"`{facts.license}`, as its card states"
        if facts.license
        else ("not stated by its card here: look it up before sharing this model")
    )
    return f"## Licence\n\nOf the base model: {stated}. The pairs it was tuned on have their own.\n"


class _Cards:
    """The card of each format; the model's facts are gathered once, before it is merged."""

    def __init__(self, opened: "OpenedModel") -> None:
        self._facts = _facts(opened)

    def __call__(self, kind: str, check: "OnnxCheck | None") -> str:

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
    from clipft.config.scenarios import SCENARIOS
    from clipft.models.huggingface import added_bias, hub_id, license_of, public_name

    base, model = opened.loaded.base, opened.loaded.model
    moved = model.logit_scale.requires_grad or added_bias(model) is not None
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
        logit_bias=added_bias(model),
    )
    return _with_history(facts, opened)


def _with_history(facts: "CardFacts", opened: "OpenedModel") -> "CardFacts":
    """What the checkpoint, and the evaluation beside it, tell of training and figures."""

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
    from clipft.config.settings import beside_defaults, fixed_on_resume

    told = [n for n in fixed_on_resume() if n in saved and n not in {"model", "scenario"}]
    if not SCENARIOS[saved["scenario"]].lora:
        told = [name for name in told if not name.startswith("lora_")]
    described = beside_defaults({name: saved[name] for name in told})
    return {
        entry["name"]: entry["value"]
        for entry in described
        if entry["name"] in _ALWAYS_TOLD or entry["changed"]
    }


def _evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """The run's evaluation, which is of its best epoch."""
    from clipft.runs.folder import RunPaths

    paths = RunPaths(checkpoint.parent)
    path = paths.evaluation
    if checkpoint != paths.best:
        return None
    return read_json(path)


_ALWAYS_TOLD = frozenset(
    {"caption", "augmentation", "lora_r", "lora_alpha", "epochs", "effective_batch_size", "lr"}
)
