"""``clipft export``: writes a folder for each format, completely or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clipft import __version__
from clipft.config.settings import Settings
from clipft.core.files import replacing
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.folders import validation_pairs
from clipft.embedding.encoding import validation_preprocessing
from clipft.export.coreml import CoreMl
from clipft.export.model_card import card_facts, model_card
from clipft.export.onnx import Onnx
from clipft.export.open_clip import check_open_clip, open_clip_lacks, write_open_clip
from clipft.export.openvino import OpenVino
from clipft.export.reduce import Reduced, check_loss, reduce_towers
from clipft.export.runtime import Runtime, Unconvertible
from clipft.export.target import MARK, unfit_for
from clipft.export.towers import TowerCheck, TowerInputs, made_up_inputs
from clipft.models import huggingface
from clipft.models.pretrained import PretrainedModel
from clipft.models.source import own_learning_rates
from clipft.runs.load import OpenedModel

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Onnx(), OpenVino(), CoreMl())}
_CHECK_BATCH = 16
_CHECK_BATCHES = 16


@dataclass(frozen=True)
class Written:
    """The result of an export.

    Attributes:
        folders: The folder of each format.
        checks: By format, the comparison of a runtime's towers with torch.
        reduced: By format, the comparison of the towers in a lower precision with fp32.
        open_clip: The largest difference of a component of open_clip's embeddings, if measured.
    """

    folders: dict[str, Path]
    checks: dict[str, TowerCheck]
    reduced: dict[str, Reduced]
    open_clip: float | None = None


@dataclass(frozen=True)
class RuntimeChoices:
    """How the towers for runtimes are written and checked.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        max_loss: The largest loss of R@10 in points; None means any.
        settings: The settings of the validation pairs for the check; None means random inputs.
    """

    precision: str = "fp32"
    max_loss: float | None = None
    settings: Settings | None = None


def export_model(
    opened: OpenedModel,
    out: Path,
    formats: Sequence[str],
    note: Callable[[str], None],
    choices: RuntimeChoices = RuntimeChoices(),
) -> Written:
    """Write a model in one or several formats, each with a model card.

    A single format is written into ``out`` itself. Several formats each get a folder in ``out``.

    Args:
        opened: the model; merging its adapters changes it.
        out: the folder to write or replace.
        formats: some of ``FORMATS``.
        note: called with sentences about the progress.
        choices: how the towers for runtimes are written and checked.

    Raises:
        StorageError: the disk is full or refuses to write; an earlier ``out`` is unchanged.
        ModelError: a runtime or open_clip gives other embeddings than torch, or the precision
            lowers R@10 by more than ``max_loss``.
    """
    base, model = opened.loaded.base, opened.loaded.model
    facts = card_facts(opened)  # before merging removes the adapters, which it counts
    several = len(formats) > 1
    checks, reduced = dict[str, TowerCheck](), dict[str, Reduced]()
    difference: float | None = None
    written = list[str]()
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
            elif name in RUNTIMES:
                runtime = RUNTIMES[name]
                try:
                    runtime.write(merged, base, folder)
                    batches = islice(_inputs(base, choices.settings), _CHECK_BATCHES)
                    checks[name] = runtime.check(folder, merged, base, batches)
                except Unconvertible as error:
                    if not several:
                        raise
                    note(f"The {name} format is skipped: {error.message}.")
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                if choices.precision != "fp32":
                    reduced[name] = _reduce(runtime, folder, base, choices, note)
            elif name == "open_clip":
                write_open_clip(merged, base, facts.logit_bias, folder)
                difference = check_open_clip(folder, merged, base)
            card = model_card(facts, name, checks.get(name), reduced.get(name))
            _describe(folder, card, opened, name)
            written.append(name)
        if several:
            _describe(temporary, model_card(facts, ""), opened, written)
    folders = {name: out / name if several else out for name in formats if name in written}
    return Written(folders, checks, reduced, difference)


def _describe(folder: Path, card: str, opened: OpenedModel, kind: str | list[str]) -> None:
    """Add the model card and the mark of an export."""
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
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
    runtime: Runtime,
    folder: Path,
    base: PretrainedModel,
    choices: RuntimeChoices,
    note: Callable[[str], None],
) -> Reduced:
    note(f"Converting the towers to {choices.precision}, and comparing them with fp32 ...")
    reduced = reduce_towers(
        runtime,
        folder,
        choices.precision,
        _inputs(base, choices.settings),
        base.inputs,
        note,
        are_pairs=choices.settings is not None,
    )
    check_loss(reduced, choices.max_loss)
    return reduced


def _inputs(base: PretrainedModel, settings: Settings | None) -> Iterator[TowerInputs]:
    if settings is None:
        yield from made_up_inputs(base.inputs)
        return
    pairs = validation_pairs(settings)
    preprocessing = validation_preprocessing(base.inputs, pairs, settings)
    batches = evaluation_batches(pairs, preprocessing, _CHECK_BATCH, LoaderOptions(workers=0))
    for batch in batches:
        if len(batch):
            yield TowerInputs(batch.pixel_values, batch.input_ids)


def unfit_formats(opened: OpenedModel) -> dict[str, str]:
    """Return the formats in which a model cannot be exported, with the reasons."""
    base = opened.loaded.base
    unfit = {**base.architecture.not_exported}
    unfit |= unfit_for(opened.settings, unfit)
    if "onnx" in unfit:  # the others convert the same towers
        unfit |= dict.fromkeys(RUNTIMES, unfit["onnx"])
    if "open_clip" not in unfit and (why := open_clip_lacks(base)):
        unfit["open_clip"] = f"open_clip has no model like this one: {why}"
    return unfit
