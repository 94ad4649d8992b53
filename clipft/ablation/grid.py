"""Plans the runs of an ablation: every combination of scenarios, settings and seeds."""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
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
"""Settings that an ablation sets itself. It uploads no checkpoints, because the checkpoints of all
seeds would have the same name in the bucket."""

_WITHOUT_TRAINING = frozenset(
    {
        "model",
        "caption",
        "caption_lines",
        "fields",
        "label_prompts",
        "data_dir",
        "max_val_pairs",
        "precision",
    }
)
"""Settings that can change the figures of a model that is not trained."""


@dataclass(frozen=True)
class Grid:
    """The scenarios, settings and seeds to combine. ``varied`` maps the name of a setting to its
    values."""

    scenarios: Sequence[str]
    seeds: Sequence[int]
    varied: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class PlannedRun:
    """A run of an ablation. Runs with the same ``variant`` differ only in their seed.

    ``varied`` are the values of the grid in this run, by setting.
    """

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
        """The run folder within ``home``."""
        return self.settings.values.run_dir

    @property
    def config(self) -> Path:
        """The file with the run's settings."""
        return self.home / "run.toml"

    @property
    def log(self) -> Path:
        """The file with the run's stderr."""
        return self.home / "log.txt"

    @property
    def finished(self) -> bool:
        """Whether the run has written its result."""
        return RunPaths(self.folder).result.is_file()


def plan_runs(grid: Grid, base: Mapping[str, Any], folder: Path) -> list[PlannedRun]:
    """List all runs, seed by seed, so that an interrupted ablation has all variants of some seeds.

    A setting is only varied in scenarios that use it: ``zero_shot`` has no learning rate, and
    ``linear_probe`` has no LoRA rank. A scenario without training needs only one seed.

    Args:
        grid: the scenarios, settings and seeds to combine.
        base: the settings of all runs that the user set. Other settings have the scenario's
            defaults.
        folder: the ablation's folder.

    Raises:
        UsageError: a scenario is unknown, a setting cannot be varied, or a value is wrong.
    """
    if not grid.scenarios or not grid.seeds or not all(grid.varied.values()):
        raise UsageError(
            "an ablation needs a scenario, a seed and a value for each setting that is varied",
            "name them, as in --scenarios zero_shot,dual_lora --seeds 1,2,3 --set lr=1e-4,1e-3",
        )
    for name in grid.scenarios:
        if name not in SCENARIOS:
            raise UsageError(
                f"--scenarios {name!r}: {unknown_choice(name, SCENARIOS)}",
                "run `clipft train --help` to see what each of them trains",
            )
    for setting in grid.varied:
        if setting in OWN:
            raise UsageError(
                f"{setting} cannot be varied with --set",
                "use --scenarios and --seeds for scenarios and seeds",
            )
    runs: dict[tuple[str, int], PlannedRun] = {}
    for seed in grid.seeds:
        for name, *values in itertools.product(grid.scenarios, *grid.varied.values()):
            scenario = SCENARIOS[name]
            if not scenario.trains and seed != grid.seeds[0]:
                continue
            used = {}
            for setting, value in zip(grid.varied, values, strict=True):
                lora = bool(scenario.lora) or not setting.startswith("lora_")
                if lora if scenario.trains else setting in _WITHOUT_TRAINING:
                    used[setting] = value
            run = _planned(scenario, used, seed, base, folder)
            runs.setdefault((run.variant, seed), run)
    return list(runs.values())


def _planned(
    scenario: Scenario, used: dict[str, Any], seed: int, base: Mapping[str, Any], folder: Path
) -> PlannedRun:
    flags = {**base, **used, "scenario": scenario.name, "seed": seed}
    flags["enable_s3_checkpoints"] = False
    values = load_settings(flags, environ={}).values.model_dump(mode="json")
    varied = {key: values[key] for key in used}
    shown = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in varied.items())
    variant = " ".join([scenario.name, *shown])
    # The folder has the name of the variant. If it had to be changed, a digest makes it unique
    name = re.sub(r"[^\w.=+-]+", "-", variant)[:80]
    if name != variant.replace(" ", "-"):
        name += f"-{hashlib.sha256(json.dumps(varied).encode()).hexdigest()[:6]}"
    home = folder / name / f"seed-{seed}"
    settings = load_settings({**flags, "output_dir": home.resolve()}, environ={})
    return PlannedRun(variant, seed, varied, settings)


def check_same_ablation(runs: Sequence[PlannedRun]) -> None:
    """Check that runs which exist already have the same settings.

    Raises:
        UsageError: the folder holds runs with other settings.
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
    """Return the settings that have the same value in all runs."""
    dumped = [run.settings.values.model_dump(mode="json") for run in runs]
    return {
        name: dumped[0][name]
        for name in Settings.model_fields
        if name not in OWN and all(values[name] == dumped[0][name] for values in dumped)
    }
