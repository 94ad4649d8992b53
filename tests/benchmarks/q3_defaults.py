"""Q3: measure the gain of ``clipft train`` with defaults, and the loss due to early stopping.

Trains the packaged tiny model in every scenario on every catalogue, with default settings, and
compares it with the pretrained model on the test pairs. If there are none, the validation pairs are
used, which have also chosen the epoch. A run that was stopped early is repeated to its last epoch,
so that its curve shows the result of each patience. To continue, run the same command again;
finished runs in --out are not repeated.

    python tests/benchmarks/q3_defaults.py --data furniture=DIR,garments=DIR --out DIR [--json FILE]
"""

import argparse
import json
import resource
import signal
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from side_by_side import arguments, clipft_json, write_figures

from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.runs.records import EpochResult
from clipft.training.defaults import PATIENT_STEPS
from clipft.training.state import EarlyStopping

TRAINED = tuple(name for name, scenario in SCENARIOS.items() if scenario.trains)
WITHOUT_END = 1_000_000
PATIENCES = {"2": 2, "3": 3, "5": 5, "none": WITHOUT_END}


@dataclass(frozen=True)
class Gain:
    """Mean recall in percent on the test pairs, or on the validation pairs if there are none.

    ``clear`` is true if the 95% interval of the difference is above 0. ``cpu_s`` is the processor
    time of training over all cores.
    """

    catalogue: str
    scenario: str
    pairs: int
    batch: int
    epochs: int
    steps: int
    cpu_s: int
    before: str
    after: str
    difference: str
    clear: bool


@dataclass(frozen=True)
class Kept:
    """Best mean recall of the validation in percent, and the number of epochs, for each patience in
    epochs. ``default`` is the patience that ``clipft train`` chooses."""

    catalogue: str
    scenario: str
    steps_per_epoch: int
    patience_2: str
    patience_3: str
    patience_5: str
    default: str
    none: str


def trained(data: Path, scenario: str, out: Path, *more: object) -> Path:
    """Train, or continue, or do nothing if the run is finished; return the run folder."""
    folder, cost = out / scenario, out / f"{scenario}_cost.json"
    if (folder / "result.json").exists():
        return folder
    spent = read(cost)["cpu_s"] if cost.exists() else 0
    began = ("--resume-from-checkpoint",) if cost.exists() else ()
    before = cpu_seconds()
    try:
        places = ("--data-dir", data, "--output-dir", out)
        clipft_json("train", "--model", "tiny", "--scenario", scenario, *places, *more, *began)
    finally:
        cost.write_text(json.dumps({"cpu_s": round(spent + cpu_seconds() - before)}))
    return folder


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def gain(catalogue: str, data: Path, scenario: str, folder: Path) -> Gain:
    measured = folder.with_name(f"{scenario}_measured.json")
    if not measured.exists():
        measured.write_text(json.dumps(clipft_json("evaluate", folder, "--data-dir", data)))
    evaluation, plan = read(measured)["evaluation"], read(folder / "run.json")["plan"]
    change = evaluation["difference"]["recall"]
    low, high = 100 * change["low"], 100 * change["high"]
    return Gain(
        catalogue,
        scenario,
        pairs=plan["train_pairs"],
        batch=plan["effective_batch_size"],
        epochs=curve(folder)[-1].epoch,
        steps=read(folder / "result.json")["steps"],
        cpu_s=read(folder.with_name(f"{scenario}_cost.json"))["cpu_s"],
        before=f"{100 * evaluation['before']['recall']:.1f}",
        after=f"{100 * evaluation['after']['recall']:.1f}",
        difference=f"{100 * change['value']:+.1f} ({low:+.1f}..{high:+.1f})",
        clear=change["low"] > 0,
    )


def curve(folder: Path) -> list[EpochResult]:
    """Return the validation results after each epoch of training."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [line for line in map(json.loads, lines) if line.pop("kind") == "epoch"]
    return [EpochResult(**epoch) for epoch in epochs if epoch["epoch"]]


def until_stopped(epochs: Sequence[EpochResult], patience: int) -> tuple[float, int]:
    """Return the best recall in percent with ``patience``, and the number of epochs until it
    stops."""
    stopping = EarlyStopping("recall", patience, Settings().min_delta)
    best = last = epochs[0]
    for last in epochs:
        if stopping.update(last):
            best = last
        if stopping.should_stop:
            break
    return 100 * best.recall(), last.epoch


@dataclass(frozen=True)
class Curve:
    """The validation results of a run without early stopping, and the results of each patience."""

    catalogue: str
    scenario: str
    steps_per_epoch: int
    epochs: list[EpochResult]

    def kept(self) -> dict[str, tuple[float, int]]:
        default = max(Settings().patience, PATIENT_STEPS // self.steps_per_epoch)
        patiences = {**PATIENCES, "default": default}
        return {name: until_stopped(self.epochs, most) for name, most in patiences.items()}

    def row(self) -> Kept:
        shown = {name: f"{recall:.1f} ({ran})" for name, (recall, ran) in self.kept().items()}
        return kept_row(self.catalogue, self.scenario, self.steps_per_epoch, shown)


def kept_row(catalogue: str, scenario: str, steps: int, shown: dict[str, str]) -> Kept:
    columns = {f"patience_{name}" if name.isdigit() else name: text for name, text in shown.items()}
    return Kept(catalogue, scenario, steps, **columns)


def mean_row(curves: Sequence[Curve]) -> Kept:
    """Return the mean loss of recall with each patience, in points, and its share of the epochs."""
    found, shown = [curve.kept() for curve in curves], dict[str, str]()
    for name in found[0]:
        lost = statistics.mean(kept[name][0] - kept["none"][0] for kept in found)
        ran = sum(kept[name][1] for kept in found) / sum(kept["none"][1] for kept in found)
        shown[name] = f"{lost:+.2f} ({ran:.0%})"
    steps = round(statistics.mean(curve.steps_per_epoch for curve in curves))
    return kept_row("mean difference", "", steps, shown)


def whole_run(row: Gain, data: Path, out: Path, more: Sequence[object]) -> Curve:
    """Return the curve to the last epoch. A run that was stopped early is repeated for it."""
    folder = out / row.catalogue / row.scenario
    if read(folder / "result.json")["stopped_early"]:
        again = out / f"{row.catalogue}-to-the-end"
        folder = trained(data, row.scenario, again, *more, "--patience", WITHOUT_END)
    steps = read(folder / "run.json")["plan"]["steps_per_epoch"]
    return Curve(row.catalogue, row.scenario, steps, curve(folder))


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="packed catalogues, as NAME=DIR,NAME=DIR")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the runs")
    parser.add_argument("--scenarios", default=",".join(TRAINED), help="default: all that train")
    return parser.parse_args()


def main() -> None:
    wish = chosen()
    pairs = (text.partition("=") for text in wish.data.split(","))
    catalogues = {name: Path(folder) for name, _, folder in pairs}
    more = ("--mini-train",) if wish.quick else ()
    signal.signal(signal.SIGTERM, lambda *_: None)  # the training process saves its state
    gains = list[Gain]()
    for scenario in wish.scenarios.split(","):
        for name, data in catalogues.items():
            folder = trained(data, scenario, wish.out / name, *more)
            gains.append(gain(name, data, scenario, folder))
            print(*asdict(gains[-1]).values(), sep="  ", flush=True)
    curves = [whole_run(row, catalogues[row.catalogue], wish.out, more) for row in gains]
    kept = [*(whole.row() for whole in curves), mean_row(curves)]
    for line in kept:
        print(*asdict(line).values(), sep="  ")
    if wish.json:
        packages = ("torch", "transformers", "peft")
        write_figures(wish.json, "Q3", gains, packages)
        write_figures(wish.json.with_name("patience.json"), "Q3", kept, packages)


if __name__ == "__main__":
    main()
