"""Q5: measure how much general recall ``--preserve`` keeps, and how much gain that costs.

Fine-tunes the packaged tiny model on a catalogue of real photos, without the penalty and with
several weights of it. Measures the last epoch of each model on the catalogue's validation pairs,
and on drawn scenes like those of the tiny model's pretraining. The general set of
``--preserve-data`` has other scenes. For comparison, weights between the pretrained and the free
model are measured (WiSE-FT). Nothing is chosen by any of these pairs. DIR holds train/ and val/
with NAME.jpg and NAME.txt.

    python tests/benchmarks/q5_preserve.py --photos DIR --out DIR [--quick] [--json FILE]
"""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from side_by_side import arguments, write_figures

from clipft.api import train
from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.embedding.load import load_model
from clipft.evaluation.evaluator import EvaluationSet
from clipft.evaluation.request import general_settings
from clipft.evaluation.wise_ft import Interpolation
from clipft.metrics.bootstrap import interval
from clipft.metrics.figures import RECALLS
from clipft.metrics.retrieval import Evaluation
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.load import load_fine_tuned
from tools.pretrain_tiny.scenes import render_scene

SCENES, KEPT = 1000, 500
"""Numbers of scenes in the general set, and of other scenes for the measurement."""
SCENE_SEED = 77
"""Not the seed of the tiny model's pretraining, so that all scenes are new to the model."""
SEEDS = (1, 2, 3)
FREE = "free"
WAYS: dict[str, dict[str, object]] = {
    FREE: {},
    "general set, W 1": {"preserve": 1.0, "preserve_data": "general"},
    "general set, W 10": {"preserve": 10.0, "preserve_data": "general"},
}
ALPHAS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Row:
    """Means over the seeds, in points of mean recall, with 95 % intervals over the queries.

    ``gain`` and ``kept`` are differences to the pretrained model, on the catalogue and the scenes.
    ``to_free`` is the difference of the gain to that of the free model, which has no penalty.
    ``of_loss`` is the share of the free model's loss on the scenes.
    """

    way: str
    gain: str
    to_free: str
    kept: str
    of_loss: str
    half_the_loss_at_no_clear_cost: str


def write_scenes(path: Path, numbers: Iterable[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            scene = render_scene(SCENE_SEED, number)
            buffer = io.BytesIO()
            scene.image.save(buffer, "JPEG", quality=90)
            for ending, data in (("jpg", buffer.getvalue()), ("txt", scene.captions[0].encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def prepare(photos: Path, out: Path) -> None:
    if not (out / "data").exists():
        packing = [sys.executable, "-m", "clipft", "pack", str(photos), str(out / "data")]
        subprocess.run(packing, check=True, stdout=subprocess.DEVNULL)
    if not (out / "general" / "val").exists():
        write_scenes(out / "general" / "train" / "0.tar", range(SCENES))
        write_scenes(out / "general" / "val" / "0.tar", range(SCENES, SCENES + KEPT))


def settings_of(way: str, seed: int, out: Path, epochs: int) -> Settings:
    given = dict(WAYS[way])
    if "preserve_data" in given:
        given["preserve_data"] = out / "general"
    folder = out / f"seed-{seed}" / way.replace(", ", "-").replace(" ", "-")
    fixed = {"model": "tiny", "lr": 1e-3, "effective_batch_size": 32, "micro_batch_size": 32}
    fixed |= {"epochs": epochs, "stop_on": "never", "precision": "fp32", "num_workers": 0}
    where = {"data_dir": out / "data", "output_dir": folder, "seed": seed}
    return load_settings({**fixed, **where, **given}, environ={}).values


@dataclass(frozen=True)
class Measured:
    own: Evaluation
    general: Evaluation


def measure(out: Path, seed: int, epochs: int) -> Iterator[tuple[str, Measured]]:
    """Train all ways with a seed. Measure them, the pretrained model and interpolated models."""
    settings = settings_of(FREE, seed, out, epochs)
    pretrained = load_model(settings, pretrained=True)
    inputs = pretrained.base.inputs
    own = EvaluationSet.open(inputs, settings)
    general = EvaluationSet.open(inputs, general_settings(settings, out / "general"))

    def figures(loaded: object) -> Measured:
        found = (pairs.evaluate(loaded).evaluation for pairs in (own, general))  # type: ignore[arg-type]
        return Measured(*found)

    yield "pretrained", figures(pretrained)
    for way in WAYS:
        settings = settings_of(way, seed, out, epochs)
        if not (settings.run_dir / "result.json").exists():
            train(settings)
        content = load_checkpoint(settings.checkpoint_path)
        loaded = load_fine_tuned(content, settings)
        yield way, figures(loaded)
        if way == FREE:
            start = load_model(settings).model.trainable_state()
            path = Interpolation(start, content["model_state_dict"])
            for alpha in ALPHAS:
                loaded.model.load_trainable_state(path.at(alpha))
                yield f"alpha {alpha:g}", figures(loaded)


def resampled(found: Evaluation) -> np.ndarray:
    """Return mean recall in each resample."""
    parts = found.parts["paired"].values()
    return np.mean([part.resampled[name] for part in parts for name in RECALLS], axis=0)


def difference(ones: Sequence[Evaluation], others: Sequence[Evaluation]) -> dict[str, float]:
    """Return the mean difference over the seeds, with an interval over the queries, which have the
    same resamples in all evaluations."""
    pairs = list(zip(ones, others, strict=True))
    value = float(np.mean([one.recall() - other.recall() for one, other in pairs]))
    values = np.mean([resampled(one) - resampled(other) for one, other in pairs], axis=0)
    return {"value": value, **interval(values)}


def shown(found: dict[str, float]) -> str:
    low, high = (100 * found[end] for end in ("low", "high"))
    return f"{100 * found['value']:+.1f} ({low:+.1f}..{high:+.1f})"


def rows(found: dict[str, list[Measured]]) -> Iterator[Row]:
    def changes(name: str, part: str, to: str) -> dict[str, float]:
        ones, others = ([getattr(m, part) for m in found[key]] for key in (name, to))
        return difference(ones, others)

    loss = changes(FREE, "general", "pretrained")["value"]
    for name in found:
        if name == "pretrained":
            continue
        kept = changes(name, "general", "pretrained")
        to_free = changes(name, "own", FREE)
        good = kept["value"] >= loss / 2 and to_free["high"] >= 0
        yield Row(
            name,
            shown(changes(name, "own", "pretrained")),
            "" if name == FREE else shown(to_free),
            shown(kept),
            f"{100 * kept['value'] / loss:.0f}%",
            "" if name == FREE else "yes" if good else "no",
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="what is finished is not repeated")
    given = parser.parse_args()
    prepare(given.photos, given.out)
    found: dict[str, list[Measured]] = {}
    for seed in SEEDS[:1] if given.quick else SEEDS:
        for name, measured in measure(given.out, seed, 1 if given.quick else 4):
            found.setdefault(name, []).append(measured)
            print(seed, name, f"{measured.own.recall():.3f} {measured.general.recall():.3f}")
    table = list(rows(found))
    for row in table:
        print(" | ".join(vars(row).values()))
    if given.json:
        write_figures(given.json, "q5", table, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
