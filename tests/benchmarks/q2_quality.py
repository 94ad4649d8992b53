"""Q2: the model that comes out after the same time, from the same weights, on several catalogues.

Compares bare ``clipft train`` and ``clipft tune`` with transformers' Trainer with PEFT, and with
sentence-transformers and its cached loss. All begin with the packaged tiny model. Each peer gets as
many epochs as fit into the time of bare ``clipft train``, and the best of three learning rates by
mean recall on the validation pairs, with the first seed. ``tune`` gets as many trials as a peer has
rates. What was chosen is then trained with the other seeds. All models are measured on the test
pairs, which chose nothing, by clipft.

``catalogues.py`` packs the catalogues of --data and divides them: where there are folds, all of
this is done in each, so that every product is tested once by each seed.

Time is the CPU time of the whole process on one thread, which is the wall time on one core of an
idle machine; so the work of others on the machine does not count. That of ``clipft train`` has its
validation and report in it, and that of the peers only their training.

Run the same command again to continue: what is finished in --out is not repeated. With --fold, only
the runs of one fold are made, so several processes can share the work.

    python tests/benchmarks/q2_quality.py --data furniture=DIR,garments=DIR --out DIR [--quick]
        [--seeds 3] [--fold N] [--json FILE]
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
from catalogues import GROUP, packed
from side_by_side import arguments, write_figures

from clipft.config.settings import Settings
from clipft.core.files import read_json, write_json
from clipft.metrics.comparisons import over_seeds_and_queries
from clipft.metrics.definitions import Floats
from clipft.metrics.retrieval import Evaluation

OURS = ("train", "tune")
PEERS = ("transformers", "sentence-transformers")
RATES = (5e-4, 1.5e-3, 4.5e-3)
PEERS_FILE = Path(__file__).with_name("q2_peers.py")


@dataclass(frozen=True)
class Result:
    """Mean recall in percent on the ``queries`` test pairs, over seeds. ``difference``: ours minus
    the peer's in points, with the 95% interval over seeds and queries. ``cpu_s`` are those of all
    runs: the seeds, the other rates of the peer, and the trials of the search."""

    catalogue: str
    ours: str
    peer: str
    queries: int
    before: float
    our_recall: float
    peer_recall: float
    difference: str
    verdict: str
    our_cpu_s: int
    peer_cpu_s: int
    chosen: str


@dataclass(frozen=True)
class Trained:
    """The models of one way, one for each seed, and what was chosen for them. ``seconds`` are the
    CPU seconds of each run that they took."""

    models: list[Path]
    seconds: list[float]
    chosen: str


@dataclass(frozen=True)
class Place:
    """One packed folder, the folder of its runs, the settings that it is measured with, and the
    seed of the resamples of its test pairs."""

    data: Path
    out: Path
    given: dict[str, str]
    resamples: int
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


def train(place: Place, way: str, seed: int, *more: object) -> tuple[Path, float]:
    """Return the run folder of ``clipft train``, and its CPU seconds."""
    folder = place.out / way / str(seed)
    words = ["train", "--data-dir", place.data, "--output-dir", folder, "--seed", seed, *more]
    cpu_s = once(folder, "-m", "clipft", *words, *(["--epochs", "2"] if place.quick else []))
    return next(folder.glob("*/best.pt")).parent, cpu_s


def bare_train(place: Place, seeds: range) -> Trained:
    runs = [train(place, "train", seed, "--model", "tiny") for seed in seeds]
    return Trained([run for run, _ in runs], [cpu_s for _, cpu_s in runs], "defaults")


def tuned(place: Place, seeds: range) -> Trained:
    """Let ``clipft tune`` search with the first seed, and train what it recommends with others."""
    folder = place.out / "tune"
    words = ["tune", "--model", "tiny", "--data-dir", place.data, "--output-dir", folder]
    words += ["--budget", len(RATES), "--confirm", 1, "--seed", seeds[0]]
    search_s = once(folder, "-m", "clipft", *words, *(["--epochs", "2"] if place.quick else []))
    answer = read_json(folder / "tune.json")
    assert answer
    best = next(trial for trial in answer["trials"] if trial["number"] == answer["chosen"])
    runs = [
        train(place, "tuned", seed, "--config", folder / "best.toml") for seed in list(seeds)[1:]
    ]
    changes = [value if name == "scenario" else name for name, value in best["changes"].items()]
    models = [folder / best["folder"], *(run for run, _ in runs)]
    seconds = [search_s, *(cpu_s for _, cpu_s in runs)]
    return Trained(models, seconds, ", ".join(changes) or "defaults")


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
    tried = {rate: peer_run(peer, place, epochs, rate, seeds[0]) for rate in RATES}
    recalls = {rate: measured(place, run, "val").recall() for rate, (run, _) in tried.items()}
    best = max(recalls, key=recalls.__getitem__)
    print(f"  {peer}: {epochs} epochs; validation recall {recalls}", flush=True)
    runs = [tried[best], *(peer_run(peer, place, epochs, best, seed) for seed in list(seeds)[1:])]
    others = [cpu_s for rate, (_, cpu_s) in tried.items() if rate != best]
    seconds = [*(cpu_s for _, cpu_s in runs), *others]
    return Trained([run for run, _ in runs], seconds, f"{epochs} epochs at {best:g}")


def measured(place: Place, model: Path, split: str) -> Evaluation:
    """Evaluate a run's best epoch, or a transformers folder, on the pairs of a split. All photos of
    a product are resampled together."""
    from clipft.config.sources import load_settings
    from clipft.evaluation.evaluator import EvaluationSet
    from clipft.runs.load import open_model

    given = {"data_dir": str(place.data), **place.given}
    opened = open_model(str(model), load_settings(given, environ={}), tuple(given))
    # All models are measured with the same resamples of the pairs, whatever their own seed
    settings: Settings = opened.settings.model_copy(update={"seed": place.resamples})
    pairs = EvaluationSet.open(opened.loaded.base.inputs, settings, split)
    return pairs.evaluate(opened.loaded).evaluation


class Tested:
    """The evaluations of one way on the test pairs: a list of the folds for each seed."""

    def __init__(self, places: list[Place], trained: list[Trained]) -> None:
        self.by_seed = [
            [measured(place, model, "test") for place, model in zip(places, models, strict=True)]
            for models in zip(*(each.models for each in trained), strict=True)
        ]
        self.queries = [fold.queries for fold in self.by_seed[0]]

    def recalls(self) -> Floats:
        """Return the mean recall over all queries for each seed: float64 [S]."""
        values = [[fold.recall() for fold in folds] for folds in self.by_seed]
        return np.average(values, 1, self.queries)

    def resampled(self) -> Floats:
        """Return the same in each resample of the queries: float64 [S, resamples]."""
        values = [[fold.resampled_recall() for fold in folds] for folds in self.by_seed]
        return np.average(values, 1, self.queries)


def train_all(place: Place, seeds: range) -> dict[str, Trained]:
    """Train all ways, unless that is done."""
    bare = bare_train(place, seeds)
    # The time of the first three runs, so that more seeds do not change what the peers get
    run_s = statistics.mean(bare.seconds[:3])
    peers = {peer: best_of_peer(peer, place, run_s, seeds) for peer in PEERS}
    return {"train": bare, "tune": tuned(place, seeds), **peers}


def results(name: str, places: list[Place], seeds: range) -> Iterator[Result]:
    folds = [train_all(place, seeds) for place in places]
    trained = {way: [fold[way] for fold in folds] for way in folds[0]}
    before = Tested(places, [Trained([Path("tiny")], [], "")] * len(places)).recalls()[0]
    tested = {way: Tested(places, models) for way, models in trained.items()}
    for way in OURS:
        for peer in PEERS:
            ours, theirs = tested[way], tested[peer]
            values = (ours.recalls() - theirs.recalls()).tolist()
            change = over_seeds_and_queries(values, ours.resampled() - theirs.resampled(), seeds[0])
            yield Result(
                name,
                way,
                peer,
                sum(ours.queries),
                percent(before),
                percent(ours.recalls().mean()),
                percent(theirs.recalls().mean()),
                f"{100 * change['value']:+.1f} "
                f"({100 * change['low']:+.1f}..{100 * change['high']:+.1f})",
                verdict(change),
                round(sum(sum(fold.seconds) for fold in trained[way])),
                round(sum(sum(fold.seconds) for fold in trained[peer])),
                f"{spoken(trained[way])}; {spoken(trained[peer])}",
            )


def spoken(trained: list[Trained]) -> str:
    """Name what was chosen in each fold."""
    return " or ".join(dict.fromkeys(fold.chosen for fold in trained))


def verdict(change: dict[str, Any]) -> str:
    if not change["clear"]:
        return "no clear difference"
    return "clearly higher" if change["value"] > 0 else "clearly lower"


def percent(share: float) -> float:
    return round(100 * share, 1)


def chosen() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="NAME=DIR,..., as they came")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fold", type=int, help="only make the runs of this fold, from 1")
    return parser.parse_args()


def main() -> None:
    wish, rows = chosen(), list[Result]()
    seeds = range(1, 2 if wish.quick else wish.seeds + 1)
    for catalogue in wish.data.split(","):
        name, _, source = catalogue.partition("=")
        out = wish.out / name
        folders = packed(Path(source), out)
        given = {"group_field": GROUP} if len(folders) > 1 else {}
        places = [
            Place(data, out / f"runs-{number}", given, number, wish.quick)
            for number, data in enumerate(folders, 1)
        ]
        if wish.fold:
            for place in places[wish.fold - 1 : wish.fold]:
                train_all(place, seeds)
            continue
        for row in results(name, places[: 1 if wish.quick else None], seeds):
            print(json.dumps(row.__dict__), flush=True)
            rows.append(row)
    if wish.json:
        packages = ("torch", "transformers", "peft", "sentence-transformers")
        write_figures(wish.json, "Q2", rows, packages)


if __name__ == "__main__":
    main()
