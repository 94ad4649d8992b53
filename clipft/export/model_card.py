"""Writes the model card (README.md) of an exported model.

Its header is the hub's metadata in YAML. The card contains no path of this machine.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from clipft.core.common import counted
from clipft.core.files import read_json
from clipft.metrics.figures import DIRECTIONS

if TYPE_CHECKING:
    from clipft.export.reduce import Reduced
    from clipft.export.towers import TowerCheck
    from clipft.runs.load import OpenedModel

_PIPELINES = {
    "transformers": "zero-shot-image-classification",
    "peft": "zero-shot-image-classification",
    "onnx": "feature-extraction",
    "openvino": "feature-extraction",
    "coreml": "feature-extraction",
    "sentence-transformers": "sentence-similarity",
    "open_clip": "zero-shot-image-classification",
}
_FIGURES = (("R@1", "r@1"), ("R@5", "r@5"), ("R@10", "r@10"), ("median rank", "median_rank"))
_ALWAYS_LISTED = frozenset(
    {"caption", "augmentation", "lora_r", "lora_alpha", "epochs", "effective_batch_size", "lr"}
)
"""Settings in every card. Other settings are listed if they were changed."""

Figures = Mapping[str, Mapping[str, Any]]
"""Direction -> name of a figure -> its value, or ``value``, ``low`` and ``high``."""


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    ``base_id`` is the base model's name on the hub, and ``license`` is the license in its own card,
    None if unknown. ``logit_scale`` is set if training changed it, and ``logit_bias`` if the class
    of the model in transformers has none. ``before`` and ``after`` are paired figures.
    """

    base: str
    base_id: str | None
    license: str | None
    scenario: str
    summary: str
    parameters: str
    images: str
    context_length: int
    logit_scale: float | None = None
    logit_bias: float | None = None
    train_pairs: int | None = None
    val_pairs: int | None = None
    epoch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Figures | None = None
    after: Figures | None = None


def card_facts(opened: "OpenedModel") -> CardFacts:
    """Collect the facts about a model. A checkpoint also has facts about training and figures."""
    from clipft.config.scenarios import SCENARIOS
    from clipft.models.huggingface import added_bias, hub_id, license_of, public_name
    from clipft.runs.folder import RunPaths

    base, model = opened.loaded.base, opened.loaded.model
    scaled = model.logit_scale.requires_grad or added_bias(model) is not None
    facts = CardFacts(
        base=public_name(base.name),
        base_id=hub_id(base.name),
        license=license_of(base.name),
        scenario=opened.settings.scenario,
        summary=SCENARIOS[opened.settings.scenario].summary,
        parameters=str(model.parameters_count()),
        images=base.inputs.images,
        context_length=base.inputs.context_length,
        logit_scale=model.logit_scale.item() if scaled else None,
        logit_bias=added_bias(model),
    )
    content, checkpoint = opened.content, opened.checkpoint
    if content is None or checkpoint is None:
        return facts
    before, best = content["before"]["retrieval"], content["best"]
    paths = RunPaths(checkpoint.parent)
    # The run's evaluation measured the best epoch, so it is only valid for this checkpoint
    evaluation = (read_json(paths.evaluation) if checkpoint == paths.best else None) or {}
    listed = _listed_settings(content["settings"])
    if "interpolated_at" in content:
        listed["interpolated_at"] = content["interpolated_at"]
    return replace(
        facts,
        train_pairs=content.get("train_pairs"),
        val_pairs=before.get("pairs"),
        epoch=best["epoch"] if best else content["epoch"],
        settings=listed,
        before=_paired(evaluation.get("before") or before),
        after=_paired(evaluation.get("after") or (best and best["retrieval"])),
    )


def _listed_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for a card: those in every card, and changed ones that affect the
    weights."""
    from clipft.config.scenarios import SCENARIOS
    from clipft.config.settings import beside_defaults, fixed_on_resume

    names = [n for n in fixed_on_resume() if n in saved and n not in {"model", "scenario"}]
    if not SCENARIOS[saved["scenario"]].lora:
        names = [name for name in names if not name.startswith("lora_")]
    described = beside_defaults({name: saved[name] for name in names})
    return {
        entry["name"]: entry["value"]
        for entry in described
        if entry["name"] in _ALWAYS_LISTED or entry["changed"]
    }


def _paired(retrieval: Mapping[str, Any] | None) -> Figures | None:
    """Return the figures of an epoch, or the paired figures of an evaluation with intervals."""
    if not retrieval:
        return None
    paired = retrieval.get("paired", retrieval)
    return {d: paired[d].get("figures", paired[d]) for d in DIRECTIONS}


def model_card(
    facts: CardFacts,
    kind: str,
    check: "TowerCheck | None" = None,
    reduced: "Reduced | None" = None,
) -> str:
    """Return the text of the card.

    Args:
        facts: from ``card_facts``.
        kind: the format of the folder, "" for one that holds several.
        check: the comparison of the towers with torch, for the formats of other runtimes.
        reduced: the comparison of the towers in a lower precision with fp32.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        base_model=facts.base_id,
        library_name=kind or None,
        license=facts.license,
        pipeline_tag=_PIPELINES.get(kind),
        tags=sorted({"clip", "clipft", "image-text-retrieval", *([kind] if kind else [])}),
    )
    name = f"{facts.base} fine-tuned" if facts.train_pairs or facts.settings else facts.base
    link = f"[{facts.base}](https://huggingface.co/{facts.base_id})"
    about = (
        f"The base model is {link if facts.base_id else facts.base}. The training scenario is "
        f"`{facts.scenario}`: {facts.summary} ({facts.parameters}). The model takes images "
        f"of {facts.images} and texts of up to "
        f"{facts.context_length} tokens and returns an embedding of each. The cosine similarity of "
        f"two embeddings says how well the image and the text match. Made with clipft.\n"
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# CLIP, {name}\n",
        about,
        _usage(facts, kind, check, reduced),
        _training(facts),
        _results(facts),
        _limits(facts),
    ]
    return "\n".join(part for part in parts if part)


def _usage(
    facts: CardFacts, kind: str, check: "TowerCheck | None", reduced: "Reduced | None"
) -> str:
    if not kind:
        return "Each folder holds the model in one format and has a card of its own.\n"
    source = files("clipft.export").joinpath("assets", f"use_{kind.replace('-', '_')}.py.txt")
    code = string.Template(source.read_text(encoding="utf-8")).safe_substitute(
        base=facts.base_id or f"PATH/TO/{facts.base}"
    )
    for tower in reduced.towers.values() if reduced else ():
        code = code.replace(tower.file.replace(f"_{tower.precision}", ""), tower.file)
    parts = [f"## Usage\n\n```python\n{code}```\n"]
    if kind == "peft" and facts.logit_scale is not None:
        parts.append(
            "Training changed the temperature, and PEFT does not store it. Cosine similarities do "
            "not need it. For probabilities, set it after loading: "
            f"`model.logit_scale.data.fill_({facts.logit_scale:.6f})`.\n"
        )
    if facts.logit_bias is not None and kind != "open_clip":
        parts.append(
            f"The sigmoid loss learned a bias of {facts.logit_bias:.6f}, which this model class "
            "cannot store. A pair's probability is sigmoid(exp(logit_scale) * cosine + bias).\n"
        )
    if check:
        pairs = counted(check.pairs, "pair")
        parts.append(
            f"Checked with {check.checked_with}: on {pairs}, the embeddings differ from those of "
            f"torch by at most {check.image_difference:.1e} per component for images and "
            f"{check.text_difference:.1e} for texts.\n"
        )
    if reduced:
        parts.append(_precision(reduced))
    return "\n".join(parts)


def _precision(reduced: "Reduced") -> str:
    lines = [
        f"- {kind}: {tower.precision}, {tower.megabytes[1]:.1f} MB instead of "
        f"{tower.megabytes[0]:.1f}; the cosine to fp32 is at least {tower.cosine:.4f}"
        for kind, tower in reduced.towers.items()
    ]
    if recall := reduced.recall:
        lines.append(
            f"- R@10 over {counted(reduced.pairs, 'pair')} is {recall['after']:.1f}% instead of "
            f"{recall['before']:.1f}% in fp32: a difference of {recall['difference']:+.1f} "
            f"points, 95% interval {recall['low']:+.1f} to {recall['high']:+.1f}"
        )
    return "\n".join(lines) + "\n"


def _training(facts: CardFacts) -> str:
    if not facts.settings:
        return ""
    lines = ["## Training\n"]
    if facts.train_pairs:
        lines.append(f"- {facts.train_pairs:,} image-text pairs for training")
    if facts.val_pairs:
        lines.append(f"- {facts.val_pairs:,} image-text pairs for validation")
    if facts.epoch is not None:
        lines.append(f"- weights after epoch {facts.epoch}")
    for name, value in facts.settings.items():
        text = " ".join(str(value).split())
        # In Markdown, code that contains backticks needs double ones around it
        lines.append(f"- {name}: " + (f"`` {text} ``" if "`" in text else f"`{text}`"))
    return "\n".join(lines) + "\n"


def _results(facts: CardFacts) -> str:
    if not facts.before:
        return ""

    def cell(figure: Any, name: str) -> str:
        def shown(value: float) -> str:
            return f"{100 * value:.1f}%" if name.startswith("r@") else f"{value:g}"

        if not isinstance(figure, Mapping):
            return "-" if figure is None else shown(figure)
        value = shown(figure["value"])
        if figure.get("low") is None or figure.get("high") is None:
            return value
        return f"{value} ({shown(figure['low'])} to {shown(figure['high'])})"

    columns = {"pretrained": facts.before, **({"fine-tuned": facts.after} if facts.after else {})}
    rows = []
    for direction, label in DIRECTIONS.items():
        for shown_name, name in _FIGURES:
            cells = [cell(found[direction].get(name), name) for found in columns.values()]
            rows.append(f"| {label} {shown_name} | " + " | ".join(cells) + " |")
    intervals = any(row.count(" to ") for row in rows)
    return "\n".join(
        [
            "## Results\n",
            f"Retrieval over {facts.val_pairs or 0:,} validation pairs. R@K is the share of "
            "queries whose partner is among the first K. Equal scores rank by position."
            + (" The brackets are 95% intervals (bootstrap)." if intervals else "")
            + "\n",
            "| | " + " | ".join(columns) + " |",
            "| --- |" + " ---: |" * len(columns),
            *rows,
            "",
        ]
    )


def _limits(facts: CardFacts) -> str:
    measured = (
        "The figures hold for images and texts like those of the validation pairs. Fine-tuning may "
        "have made the model worse on other subjects, so measure it there before you use it."
        if facts.settings
        else "These are the pretrained weights. Nothing was measured for this card."
    )
    stated = (
        f"`{facts.license}`, as its card states"
        if facts.license
        else "not stated in its card. Look it up before you share this model"
    )
    return (
        f"## Limitations\n\n- {measured}\n"
        "- The model has the biases of the base model and of the pairs it was fine-tuned on. It is "
        "not intended for recognizing or judging people.\n"
        f"- Texts longer than {facts.context_length} tokens are truncated.\n\n"
        f"## License\n\nThe license of the base model is {stated}. The pairs used for fine-tuning "
        "have licenses of their own.\n"
    )
