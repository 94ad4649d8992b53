"""The settings model: all sections joined, and the defaults that depend on a command.

Settings are frozen. Each section of ``clipft.config.sections`` is a base class of ``Settings``, so
a service can ask for the section it needs (``OptimSettings``) and accept the whole.
``clipft.config.sources`` decides where the values come from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipft.config.fields import Section, extra_of
from clipft.config.scenarios import CHECKPOINT_SUFFIX, SCENARIOS, Scenario
from clipft.config.sections.data import DataSettings, StorageSettings
from clipft.config.sections.measuring import EvaluationSettings, TrackingSettings
from clipft.config.sections.model import AdaptSettings, LossSettings, ModelSettings
from clipft.config.sections.training import OptimSettings, RunSettings

FOLLOWING = ("effective_batch_size", "epochs", "patience", "lr")
"""Settings that follow the catalogue and the base model where the user has set nothing."""

LABELS = {"positives": "label", "stop_on": "accuracy"}
"""Defaults under ``--label-prompts``: images of one label belong together, and accuracy counts."""

MINI_TRAIN = {
    "epochs": 1,
    "effective_batch_size": 32,
    "micro_batch_size": 16,
    "max_train_pairs": 128,
    "max_val_pairs": 64,
    "num_workers": 0,
}
"""Defaults under ``--mini-train``: every stage of a run, in seconds."""

DEMO = {
    "model": "tiny",
    "output_dir": "./clipft-demo",
    "epochs": 3,
    "effective_batch_size": 128,
    "micro_batch_size": 128,
    "lr": 4e-3,
    "precision": "fp32",
    "num_workers": 2,
}
"""Defaults of ``clipft demo``: as much as two CPU cores can learn in about a minute."""

SECTIONS: tuple[type[Section], ...] = (
    StorageSettings,
    DataSettings,
    ModelSettings,
    LossSettings,
    OptimSettings,
    RunSettings,
    EvaluationSettings,
    TrackingSettings,
)


class Settings(
    TrackingSettings,
    EvaluationSettings,
    RunSettings,
    OptimSettings,
    AdaptSettings,
    DataSettings,
    StorageSettings,
):
    """All settings of a run."""

    @property
    def declared_scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.scenario

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / f"{self.scenario}{CHECKPOINT_SUFFIX}"


EVALUATION_OVERRIDES = (
    "data_dir",
    "caption",
    "caption_lines",
    "num_workers",
    "max_val_pairs",
    "max_bad",
    "micro_batch_size",
    "precision",
    "device",
    "group_field",
    *EvaluationSettings.model_fields,
)
"""Settings that an evaluation may set; the others come from the checkpoint."""


def fixed_on_resume() -> list[str]:
    """The names of the settings that decide the weights and so must not change on resume."""
    fields = Settings.model_fields.items()
    return [name for name, field in fields if extra_of(field)["fate"] == "fixed"]


def beside_defaults(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe settings, dumped in JSON mode, by name, value, default, and whether they differ."""
    standard = Settings().model_dump(mode="json")
    return [
        {
            "name": name,
            "value": value,
            "default": standard[name],
            "changed": value != standard[name],
        }
        for name, value in values.items()
    ]
