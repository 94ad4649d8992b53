"""Q2: the model that comes out after the same time, from the same weights, on several catalogues.

Compares bare ``clipft train`` and ``clipft tune`` with transformers' Trainer with PEFT, and with
sentence-transformers and its cached loss. All begin with the packaged tiny model. Each peer gets as
many epochs as fit into the time of bare ``clipft train``, and the best of three learning rates by
mean recall on the validation pairs, while bare ``train`` gets one run. ``tune`` gets TRIALS trials.
All models are then measured on the test pairs, which chose nothing, by clipft.

Time is the CPU time of the whole process on one thread, which is the wall time on one core of an
idle machine; so the work of others on the machine does not count. That of ``clipft train`` has its
validation and report in it, and that of the peers only their training.

DIR is made by ``clipft pack`` and has train/, val/ and test/. Run the same command again to
continue: what is finished in --out is not repeated.

    python tests/benchmarks/q2_quality.py --data furniture=DIR,garments=DIR --out DIR [--quick]
        [--tune TRIALS] [--seeds 3] [--json FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import arguments, write_figures

from clipft.config.settings import Settings
from clipft.core.files import read_json, write_json
from clipft.metrics.comparisons import over_seeds_and_queries
from clipft.metrics.retrieval import Evaluation

PEERS = ("transformers", "sentence-transformers")
RATES = (5e-4, 1.5e-3, 4.5e-3)
PEERS_FILE = Path(__file__).with_name("q2_peers.py")


@dataclass(frozen=True)
class Result:
    """Mean recall in percent on the test pairs, over seeds. ``difference``: ours minus the peer's
    in points, with the 95% interval over seeds and queries. ``cpu_s`` are those of all runs: of
    three seeds, and with them the other rates of the peer and the trials of the search."""

    catalogue: str
    ours: str
    peer: str
    before: float
    our_recall: float
    peer_recall: float
    difference: str
    verdict: str
    our_cpu_s: int
    peer_cpu_s: int
    peer_epochs: int
    peer_lr: float


@dataclass(frozen=True)
class Trained:
    """A model of one way, by seed; ``cpu_s`` is that of one run, ``whole_s`` of all that led to
    these models."""

    models: dict[int, Path]
    cpu_s: float
    whole_s: float
    epochs: int = 0
    lr: float = 0.0


@dataclass(frozen=True)
class Place:
    """One catalogue, and the folder of its runs."""

    data: Path
    out: Path
    quick: bool


def timed(command: list[str]) -> float:
    """Run a command on one thread and return the CPU seconds of it and its workers."""
    child = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return used.ru_utime + used.ru_stime


def once(folder: Path, *command: object) -> float:
    """Run a command that fills ``folder``, unless that is done; return its CPU seconds."""
    done = folder.with_name(f"{folder.name}.json")
    if saved := read_json(done):
        return float(saved["cpu_s"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    cpu_s = timed([sys.executable, *map(str, command)])
    write_json(done, {"cpu_s": cpu_s})
    return cpu_s


def bare_train(place: Place, seeds: range) -> Trained:
    fewer = ["--epochs", "2"] if place.quick else []
    models, cpu_s = dict[int, Path](), list[float]()
    for seed in seeds:
        folder = place.out / "train" / str(seed)
        words = ["train", "--model", "tiny", "--data-dir", place.data, "--output-dir", folder]
        words += ["--seed", seed, *fewer]
        cpu_s.append(once(folder, "-m", "clipft", *words))
        models[seed] = folder / "dual_lora"
    return Trained(models, statistics.mean(cpu_s), sum(cpu_s))


def tuned(place: Place, trials: int, seeds: range) -> Trained:
    """``clipft tune``, whose winner it trains with so many seeds itself."""
    folder = place.out / "tune"
    words = ["tune", "--model", "tiny", "--data-dir", place.data, "--output-dir", folder]
    words += ["--budget", trials, "--confirm", len(seeds), "--seed", seeds[0]]
    cpu_s = once(folder, "-m", "clipft", *words)
    answer, kept = read_json(folder / "tune.json"), read_json(folder / "measured.json")
    assert answer and kept
    variant = "winner" if answer["chosen"] else "defaults"
    runs = {seed: Path(home) for of, seed, home in kept["of"]["runs"] if of == variant}
    return Trained(
        {seed: next(home.glob("*/best.pt")).parent for seed, home in runs.items()},
        cpu_s / trials,
        cpu_s,
    )


def peer_run(peer: str, place: Place, epochs: int, lr: float, seed: int) -> tuple[Path, float]:
    folder = place.out / peer / f"{epochs}-epochs-lr-{lr:g}-seed-{seed}"
    words = [peer, "--data", place.data, "--out", folder, "--epochs", epochs, "--lr", lr]
    words += ["--seed", seed]
    return folder, once(folder, PEERS_FILE, *words)


def best_of_peer(peer: str, place: Place, cpu_s: float, seeds: range) -> Trained:
    """Train a peer for ``cpu_s`` with the first seed at each rate, and at the best with all."""
    _, few = peer_run(peer, place, 2, RATES[0], seeds[0])
    _, more = peer_run(peer, place, 8, RATES[0], seeds[0])
    epochs = max(1, round(2 + (cpu_s - few) / (more - few) * 6))
    tried = {rate: peer_run(peer, place, epochs, rate, seeds[0])[0] for rate in RATES}
    recalls = {rate: measured(place, model, "val").recall() for rate, model in tried.items()}
    best = max(recalls, key=recalls.__getitem__)
    print(f"  {peer}: {epochs} epochs; validation recall {recalls}", flush=True)
    runs = {seed: peer_run(peer, place, epochs, best, seed) for seed in seeds}
    seconds = [took for _, took in runs.values()]
    search = [peer_run(peer, place, epochs, rate, seeds[0])[1] for rate in RATES if rate != best]
    models = {seed: run for seed, (run, _) in runs.items()}
    return Trained(models, statistics.mean(seconds), sum(seconds) + sum(search), epochs, best)


def measured(place: Place, model: Path, split: str) -> Evaluation:
    """Evaluate a run's best epoch, or a transformers folder, on the pairs of a split."""
    from clipft.config.sources import load_settings
    from clipft.evaluation.evaluator import EvaluationSet
    from clipft.runs.load import open_model

    now = load_settings({"data_dir": str(place.data)}, environ={})
    opened = open_model(str(model), now, ("data_dir",))
    # All models are measured with the same resamples of the pairs, whatever their own seed
    settings: Settings = opened.settings.model_copy(update={"seed": 1})
    pairs = EvaluationSet.open(opened.loaded.base.inputs, settings, split)
    return pairs.evaluate(opened.loaded).evaluation


def on_test(place: Place, trained: Trained) -> dict[int, Evaluation]:
    return {seed: measured(place, model, "test") for seed, model in trained.models.items()}


def results(name: str, place: Place, seeds: range, trials: int) -> Iterator[Result]:
    train = bare_train(place, seeds)
    ways = {"train": train}
    if trials:
        ways["tune"] = tuned(place, trials, seeds)
    peers = {peer: best_of_peer(peer, place, train.cpu_s, seeds) for peer in PEERS}
    before = measured(place, Path("tiny"), "test").recall()
    figures = {way: on_test(place, trained) for way, trained in (ways | peers).items()}
    for way, trained in ways.items():
        for peer in PEERS:
            ours, theirs = figures[way], figures[peer]
            both = [seed for seed in ours if seed in theirs]
            values = [ours[seed].recall() - theirs[seed].recall() for seed in both]
            resampled = [
                ours[seed].resampled_recall() - theirs[seed].resampled_recall() for seed in both
            ]
            change = over_seeds_and_queries(values, np.stack(resampled), seeds[0])
            yield Result(
                name,
                way,
                peer,
                percent(before),
                percent(statistics.mean(e.recall() for e in ours.values())),
                percent(statistics.mean(e.recall() for e in theirs.values())),
                " ".join(
                    (
                        f"{100 * change['value']:+.1f}",
                        f"({100 * change['low']:+.1f}..{100 * change['high']:+.1f})",
                    )
                ),
                verdict(change),
                round(trained.whole_s),
                round(peers[peer].whole_s),
                peers[peer].epochs,
                peers[peer].lr,
            )


def verdict(change: dict[str, Any]) -> str:
    if not change["clear"]:
        return "no clear difference"
    return "clearly higher" if change["value"] > 0 else "clearly lower"


def percent(share: float) -> float:
    return round(100 * share, 1)


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="NAME=DIR,... with train/, val/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--tune", type=int, default=0, help="trials of clipft tune; 0: none")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    wish, rows = chosen(), list[Result]()
    seeds = range(1, 2 if wish.quick else wish.seeds + 1)
    for catalogue in wish.data.split(","):
        name, _, data = catalogue.partition("=")
        for row in results(name, Place(Path(data), wish.out / name, wish.quick), seeds, wish.tune):
            print(json.dumps(row.__dict__), flush=True)
            rows.append(row)
    if wish.json:
        packages = ("torch", "transformers", "peft", "sentence-transformers")
        write_figures(wish.json, "Q2", rows, packages)


if __name__ == "__main__":
    main()
