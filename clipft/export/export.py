"""``clipft export``: one folder per format, each written whole or not at all."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipft import __version__
from clipft.config.settings import Settings
from clipft.core.files import replacing
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.dataset import validation_pairs
from clipft.embedding.encoding import validation_preprocessing
from clipft.export.model_card import card_facts, model_card
from clipft.export.onnx import (
    OnnxCheck,
    OnnxInputs,
    check_onnx,
    made_up_inputs,
    normalized,
    write_onnx,
)
from clipft.export.open_clip import check_open_clip, open_clip_lacks, write_open_clip
from clipft.export.reduce import Reduced, check_loss, reduce_towers
from clipft.export.target import MARK, unfit_for
from clipft.models import huggingface
from clipft.models.pretrained import PretrainedModel
from clipft.models.source import own_learning_rates
from clipft.runs.load import OpenedModel

_CHECK_BATCH = 16
_CHECK_BATCHES = 16


@dataclass(frozen=True)
class Written:
    """The folder of each format, how the ONNX towers compare with torch, how those of a lower
    precision compare with them, and the largest difference of open_clip's embeddings."""

    folders: dict[str, Path]
    onnx: OnnxCheck | None = None
    reduced: Reduced | None = None
    open_clip: float | None = None


def export_model(
    opened: OpenedModel,
    out: Path,
    formats: Sequence[str],
    note: Callable[[str], None],
    checked_on: Settings | None = None,
    precision: str = "fp32",
    max_loss: float | None = None,
) -> Written:
    """Write a model in some formats, each with a model card.

    One format is written into ``out`` itself, several into a folder each within it.

    Args:
        opened: the model; merging its adapters changes it.
        out: the folder to write or replace.
        formats: some of ``FORMATS``.
        note: called with what is being done.
        checked_on: settings whose validation pairs ONNX is checked with; None for made-up inputs.
        precision: that of the ONNX towers.
        max_loss: the most points of R@10 that a lower precision may cost.

    Raises:
        StorageError: the disk is full or refuses; an earlier ``out`` is unchanged.
        ModelError: ONNX or open_clip gives other embeddings than torch, or the precision costs
            too much.
    """
    base, model = opened.loaded.base, opened.loaded.model
    facts = card_facts(opened)  # before merging, which removes the adapters that it counts
    several = len(formats) > 1
    check: OnnxCheck | None = None
    reduced: Reduced | None = None
    difference: float | None = None
    merged: Any = None
    with replacing(out) as temporary:
        temporary.mkdir(parents=True)
        # The adapter first, because merging consumes it
        for name in sorted(formats, key=lambda name: name != "peft"):
            note(f"Writing {name} ...")
            folder = temporary / name if several else temporary
            if name == "peft":
                huggingface.write_adapter(model, base.name, folder)
            else:
                merged = huggingface.merged(model) if merged is None else merged
            if name == "transformers":
                huggingface.write_transformers(merged, base, folder)
            elif name == "sentence-transformers":
                huggingface.write_sentence_transformers(merged, base, folder)
            elif name == "onnx":
                write_onnx(merged, base, folder)
                check = check_onnx(
                    folder, merged, base, islice(_onnx_inputs(base, checked_on), _CHECK_BATCHES)
                )
                if precision != "fp32":
                    reduced = _reduce(folder, base, precision, checked_on, note)
                    check_loss(reduced, max_loss)
            elif name == "open_clip":
                write_open_clip(merged, base, facts.logit_bias, folder)
                difference = check_open_clip(folder, merged, base)
            card = model_card(facts, name, *((check, reduced) if name == "onnx" else ()))
            _describe(folder, card, opened, name)
        if several:
            _describe(temporary, model_card(facts, ""), opened, list(formats))
    folders = {name: out / name if several else out for name in formats}
    return Written(folders, check, reduced, difference)


def _describe(folder: Path, card: str, opened: OpenedModel, kind: str | list[str]) -> None:
    """Add the model card and the mark of an export."""
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # safetensors makes them private to their owner
        weights.chmod(readme.stat().st_mode)
    mark = {
        "clipft": __version__,
        "format": kind,
        "base_model": huggingface.public_name(opened.loaded.base.name),
        "base_fingerprint": opened.loaded.fingerprint,
        "scenario": opened.settings.scenario,
        "learning_rates": own_learning_rates(opened.loaded.base.name),
    }
    (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def _reduce(
    folder: Path,
    base: PretrainedModel,
    precision: str,
    settings: Settings | None,
    note: Callable[[str], None],
) -> Reduced:
    note(f"Converting the towers to {precision}, and comparing them with fp32 ...")
    batches = _onnx_inputs(base, settings)
    as_input = partial(normalized, base.inputs)
    return reduce_towers(folder, precision, batches, as_input, note, settings is not None)


def _onnx_inputs(base: PretrainedModel, settings: Settings | None) -> Iterator[OnnxInputs]:
    if settings is None:
        yield from made_up_inputs(base.inputs)
        return
    pairs = validation_pairs(settings)
    preprocessing = validation_preprocessing(base.inputs, pairs, settings)
    batches = evaluation_batches(pairs, preprocessing, _CHECK_BATCH, LoaderOptions(workers=0))
    for batch in batches:
        if len(batch):
            yield OnnxInputs(batch.pixel_values, batch.input_ids)


def unfit_formats(opened: OpenedModel) -> dict[str, str]:
    """Say of each format in which a model cannot be exported why not."""
    base = opened.loaded.base
    unfit = {**base.architecture.not_exported}
    unfit |= unfit_for(opened.settings, unfit)
    if "open_clip" not in unfit and (why := open_clip_lacks(base)):
        unfit["open_clip"] = f"open_clip has no model like this one: {why}"
    return unfit
