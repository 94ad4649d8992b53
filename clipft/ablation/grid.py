"""The runs of an ablation: scenarios x settings x seeds, each with settings of its own."""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.scenarios import SCENARIOS, Scenario
from clipft.config.settings import Settings, fixed_on_resume
from clipft.config.sources import LoadedSettings, load_settings
from clipft.core.errors import UsageError, unknown_choice
from clipft.runs.folder import RunPaths

OWN = frozenset(
    {"scenario", "seed", "output_dir", "resume_from_checkpoint", "enable_s3_checkpoints"}
)
"""Settings that an ablation sets itself. Checkpoints are not uploaded: in the bucket those of
all seeds would have one name."""

_WITHOUT_TRAINING = frozenset({"model", "caption", "data_dir", "max_val_pairs", "precision"})
"""Settings that may change the figures of a model that is not trained."""


@dataclass(frozen=True)
class Grid:
    """What is varied. ``varied`` maps a setting to its values."""

    scenarios: Sequence[str]
    seeds: Sequence[int]
    varied: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class PlannedRun:
    """``variant`` names what the seeds have in common; ``varied`` is its part of the grid."""

    variant: str
    seed: int
    varied: dict[str, Any]
    settings: LoadedSettings

    @property
    def home(self) -> Path:
        """The run's own --output-dir."""
        return self.settings.values.output_dir

    @property
    def folder(self) -> Path:
        return self.settings.values.run_dir

    @property
    def config(self) -> Path:
        return self.home / "run.toml"

    @property
    def log(self) -> Path:
        return self.home / "log.txt"

    @property
    def finished(self) -> bool:
        return RunPaths(self.folder).result.is_file()


def plan_runs(grid: Grid, base: Mapping[str, Any], folder: Path) -> list[PlannedRun]:
    """Every run, seed by seed, so that an ablation cut short has all variants of some seeds.

    A setting that a scenario does not use makes no run of its own: ``zero_shot`` has no
    learning rate, ``linear_probe`` no LoRA rank. What is not trained needs one seed.

    Raises:
        UsageError: an unknown scenario, a setting that cannot be varied, a wrong value.
    """
    _check(grid)
    runs: dict[tuple[str, int], PlannedRun] = {}
    for seed in grid.seeds:
        for name, values in _cells(grid):
            scenario = SCENARIOS[name]
            if not scenario.trains and seed != grid.seeds[0]:
                continue
            used = {key: value for key, value in values.items() if _matters(key, scenario)}
            run = _planned(scenario, used, seed, base, folder)
            runs.setdefault((run.variant, seed), run)
    return list(runs.values())


def _cells(grid: Grid) -> Iterator[tuple[str, dict[str, Any]]]:
    names = list(grid.varied)
    for scenario, *values in itertools.product(grid.scenarios, *grid.varied.values()):
        yield scenario, dict(zip(names, values, strict=True))


def _matters(name: str, scenario: Scenario) -> bool:
    if not scenario.trains:
        return name in _WITHOUT_TRAINING
    return bool(scenario.lora) or not name.startswith("lora_")


def _planned(
    scenario: Scenario, used: dict[str, Any], seed: int, base: Mapping[str, Any], folder: Path
) -> PlannedRun:
    # ``base`` holds what the user set, so a scenario's own defaults hold where nothing is
    flags = {**base, **used, "scenario": scenario.name, "seed": seed}
    flags["enable_s3_checkpoints"] = False
    values = load_settings(flags, environ={}).values.model_dump(mode="json")
    varied = {key: values[key] for key in used}
    variant = " ".join([scenario.name, *(f"{k}={_shown(v)}" for k, v in varied.items())])
    home = folder / _file_name(variant, varied) / f"seed-{seed}"
    settings = load_settings({**flags, "output_dir": home.resolve()}, environ={})
    return PlannedRun(variant, seed, varied, settings)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file_name(variant: str, varied: Mapping[str, Any]) -> str:
    """The variant as a folder's name; a digest tells apart what had to be replaced or cut."""
    name = re.sub(r"[^\w.=+-]+", "-", variant)[:80]
    if name == variant.replace(" ", "-"):
        return name
    return f"{name}-{hashlib.sha256(json.dumps(varied).encode()).hexdigest()[:6]}"


def _check(grid: Grid) -> None:
    if not grid.scenarios or not grid.seeds or not all(grid.varied.values()):
        raise UsageError(
            "an ablation needs a scenario, a seed and a value for each setting that is varied",
            "name them, as in --scenarios zero_shot,dual_lora --seeds 1,2,3 --set lr=1e-4,1e-3",
        )
    for scenario in grid.scenarios:
        if scenario not in SCENARIOS:
            raise UsageError(
                f"--scenarios {scenario!r}: {unknown_choice(scenario, SCENARIOS)}",
                "`clipft train --help` says what each of them trains",
            )
    for name in grid.varied:
        if name in OWN:
            raise UsageError(
                f"{name} cannot be varied with --set",
                "scenarios and seeds have options of their own",
            )


def check_same_ablation(runs: Sequence[PlannedRun]) -> None:
    """
    Raises:
        UsageError: the folder holds runs of other settings.
    """
    fixed = fixed_on_resume()
    for run in runs:
        if not run.config.is_file():
            continue
        saved = tomllib.loads(run.config.read_text(encoding="utf-8"))
        now = run.settings.values.model_dump(mode="json")
        changed = [f"{n} {saved.get(n)} -> {now[n]}" for n in fixed if saved.get(n) != now[n]]
        if changed:
            raise UsageError(
                f"{run.home} holds a run with other settings: {', '.join(changed)}",
                "set them back, or choose another --output-dir",
            )


def settings_in_common(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """The settings that all runs have at the same value."""
    dumped = [run.settings.values.model_dump(mode="json") for run in runs]
    return {
        name: dumped[0][name]
        for name in Settings.model_fields
        if name not in OWN and all(values[name] == dumped[0][name] for values in dumped)
    }
