"""The one settings model. Every default of clipft stands in this file and nowhere else.

A value comes from, strongest first: a flag, the environment (``CLIPFT_LR``), a TOML file
(``--config``), a profile (``--mini-train``, the scenario), the default. ``load_settings``
merges them, validates once, and remembers where each value came from; after that the
settings are frozen. Sections are base classes, so a service asks for the section it needs
(``OptimSettings``) and is handed the whole.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from clipft.errors import UsageError, nearest
from clipft.scenarios import SCENARIOS, Scenario

ENV_PREFIX = "CLIPFT_"
ENV_OTHERS = frozenset({"CLIPFT_CONFIG", "CLIPFT_CACHE"})
"""Names of the environment that are clipft's without being settings."""

MINI_TRAIN = {
    "epochs": 1,
    "effective_batch_size": 32,
    "micro_batch_size": 16,
    "max_train_pairs": 128,
    "max_val_pairs": 64,
    "num_workers": 0,
}
"""Defaults under ``--mini-train``: the whole way of a run in seconds."""

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
"""Defaults of ``clipft demo``: as much learning as two cores do in a minute."""

Fate = Literal["fixed", "free"]


def _field(default: Any, text: str, fate: Fate = "free", **constraints: Any) -> Any:
    """A setting. ``fixed`` ones decide the weights: a resumed run keeps them as they were."""
    return Field(default, description=text, json_schema_extra={"fate": fate}, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    title: ClassVar[str]


class StorageSettings(Section):
    title = "Storage"
    data_dir: Path = _field(
        Path("/tmp/furniture_data"),  # noqa: S108 (only read from, and the user's to set)
        "folder with the shards: train/*.tar and val/*.tar",
    )
    s3_bucket: str | None = _field(None, "bucket that holds the pairs; none: data_dir as it is")
    s3_prefix: str = _field("data/train", "prefix of the training pairs in the bucket")
    s3_val_prefix: str = _field("data/val", "prefix of the validation pairs in the bucket")
    endpoint_url: str | None = _field(None, "URL of an S3-compatible server other than AWS")
    s3_region: str | None = _field(None, "region of the bucket; none: as boto3 finds it")
    s3_profile: str | None = _field(None, "profile of the AWS configuration")
    enable_s3_checkpoints: bool = _field(False, "upload each saved checkpoint to the bucket")


class DataSettings(Section):
    title = "Data"
    augmentation: Literal["none", "simple", "advanced"] = _field(
        "simple",
        "the model's own preprocessing; flip and padded random crop; "
        "TrivialAugmentWide and random erasing 0.2",
        "fixed",
    )
    num_workers: int = _field(4, "processes that decode images; 0: none besides the main", ge=0)
    max_train_pairs: int = _field(0, "train on the first so many pairs; 0: all", "fixed", ge=0)
    max_val_pairs: int = _field(0, "validate on the first so many pairs; 0: all", "fixed", ge=0)
    max_bad: float = _field(0.01, "share of unreadable pairs above which a run stops", ge=0, le=1)


class ModelSettings(Section):
    title = "Model"
    model: str = _field(
        "openai/clip-vit-base-patch32",
        "CLIP checkpoint: hub id, local folder, or 'tiny' (carried by the package)",
        "fixed",
    )
    scenario: str = _field(
        "dual_lora",
        "; ".join(f"{s.name}: {s.summary}" for s in SCENARIOS.values()),
        "fixed",
    )
    lora_r: int = _field(16, "rank of the LoRA adapters", "fixed", ge=1)
    lora_alpha: float = _field(32, "LoRA scale: alpha / r", "fixed", gt=0)
    lora_dropout: float = _field(0.05, "dropout before the adapters", "fixed", ge=0, lt=1)

    @field_validator("scenario")
    @classmethod
    def _known_scenario(cls, value: str) -> str:
        if value not in SCENARIOS:
            raise ValueError(_unknown_choice(value, SCENARIOS))
        return value


class OptimSettings(Section):
    title = "Optimisation"
    epochs: int = _field(10, "passes over the training pairs", "fixed", ge=1)
    effective_batch_size: int = _field(
        1024, "pairs per optimizer step; the loss is taken over all of them", "fixed", ge=2
    )
    micro_batch_size: int = _field(
        0, "pairs per forward pass; 0: find it (64 where nothing can be found)", ge=0
    )
    accumulation: Literal["exact", "local"] = _field(
        "exact",
        "loss over the whole effective batch in the memory of a micro-batch; "
        "or over each micro-batch alone, as most scripts do",
        "fixed",
    )
    lr: float = _field(1e-4, "highest learning rate (linear_probe: 1e-3)", "fixed", ge=0)
    wd: float = _field(0.1, "weight decay; none on norms, biases and logit scale", "fixed", ge=0)
    warmup_steps: int = _field(
        100, "optimizer steps of warm-up, at most a tenth of all steps", "fixed", ge=0
    )
    grad_clip: float = _field(1.0, "largest gradient norm; 0: no clipping", "fixed", ge=0)
    optimizer: Literal["auto", "adamw", "adamw8bit"] = _field(
        "auto", "auto is AdamW8bit on a GPU where it saves memory, else fused AdamW", "fixed"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field(
        "auto", "auto is bf16 where the hardware has it, fp16 on older GPUs, else fp32", "fixed"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _field("auto", "where to compute")
    stop_on: Literal["loss", "recall", "never"] = _field(
        "loss", "validation figure of early stopping and of the best epoch", "fixed"
    )
    patience: int = _field(2, "epochs without improvement before stopping", "fixed", ge=1)
    min_delta: float = _field(0.001, "least change that counts as improvement", "fixed", ge=0)


class RunSettings(Section):
    title = "Run"
    output_dir: Path = _field(Path("./checkpoints"), "folder of the runs, one per scenario")
    mini_train: bool = _field(
        False, "smoke test: a few steps on a few pairs; other settings still win", "fixed"
    )
    seed: int = _field(42, "decides order, augmentation, initialisation, dropout", "fixed", ge=0)
    checkpoint_every: int = _field(
        100, "optimizer steps between checkpoints, besides each epoch's end; 0: none", ge=0
    )
    resume_from_checkpoint: bool = _field(
        False, "go on from the checkpoint in output_dir if there is one"
    )


class TrackingSettings(Section):
    title = "Tracking"
    wandb: Literal["disabled", "offline", "online"] = _field(
        "disabled", "Weights & Biases; metrics.jsonl is always written"
    )
    wandb_project: str = _field("clip-furniture-finetune", "project of the runs in W&B")


SECTIONS: tuple[type[Section], ...] = (
    StorageSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    TrackingSettings,
)


class Settings(
    TrackingSettings, RunSettings, OptimSettings, ModelSettings, DataSettings, StorageSettings
):
    """Everything that can be set."""

    @property
    def declared_scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.scenario

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / f"{self.scenario}_checkpoint.pt"


def fields_of(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings that ``section`` itself declares, in order."""
    yield from section.model_fields.items()


def fixed_on_resume() -> list[str]:
    """Names of the settings that decide the weights and so must not change on resume."""
    extras = {name: field.json_schema_extra for name, field in Settings.model_fields.items()}
    return [name for name, extra in extras.items() if extra == {"fate": "fixed"}]


@dataclass(frozen=True)
class LoadedSettings:
    """Validated settings and, for each, where its value came from."""

    values: Settings
    origins: dict[str, str]

    def to_toml(self) -> str:
        """The settings as TOML that ``--config`` reads back, each line with its origin."""
        lines = ["# clipft settings: flags > CLIPFT_... > file > profile > default"]
        dumped = self.values.model_dump(mode="json")
        for section in SECTIONS:
            lines += ["", f"# {section.title}"]
            for name, _ in fields_of(section):
                value, origin = dumped[name], self.origins[name]
                text = f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
                lines.append(f"{text}  # {origin}" if value is not None else text)
        return "\n".join(lines) + "\n"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> LoadedSettings:
    """Merge the sources, validate once. ``profile`` are the defaults of one command.

    Raises:
        UsageError: with every mistake at once, each naming its source.
    """
    sources = [
        (dict(flags or {}), "flag"),
        (_from_environment(os.environ if environ is None else environ), "environment"),
        (_from_file(config) if config else {}, f"file {config}"),
        (dict(profile or {}), "command"),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    for source, origin in [*sources, *_profiles(sources)]:
        for name, value in source.items():
            if name not in values:
                values[name], origins[name] = value, origin
    try:
        return LoadedSettings(Settings(**values), origins)
    except ValidationError as error:
        raise _mistakes(error, origins) from error


def _profiles(sources: list[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """Defaults that follow from another setting: a smoke test's, a scenario's."""

    def chosen(name: str) -> Any:
        given = (source[name] for source, _ in sources if name in source)
        return next(given, Settings.model_fields[name].default)

    profiles: list[tuple[dict[str, Any], str]] = []
    if str(chosen("mini_train")).lower() in {"true", "1", "yes", "on"}:
        profiles.append((dict(MINI_TRAIN), "mini_train"))
    scenario = SCENARIOS.get(chosen("scenario"))
    if scenario and scenario.lr is not None:
        profiles.append(({"lr": scenario.lr}, f"scenario {scenario.name}"))
    return profiles


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHERS:
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in Settings.model_fields:
            raise _unknown_name(name, key, lambda near: ENV_PREFIX + near.upper())
        values[key] = None if value == "" else value
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read settings file {path}: {error}", "check --config") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not TOML: {error}", "compare with the output of `clipft settings`"
        ) from error
    for key in values:
        if key not in Settings.model_fields:
            raise _unknown_name(f"{key} in {path}", key, str)
    return values


def _unknown_name(shown: str, key: str, spell: Any) -> UsageError:
    near = nearest(key, Settings.model_fields)
    hint = f"did you mean {spell(near)}?" if near else "`clipft settings` lists every name"
    return UsageError(f"unknown setting {shown}", hint)


def _unknown_choice(value: str, choices: Any) -> str:
    near = nearest(value, choices)
    listed = f"one of {', '.join(choices)}"
    return f"must be {listed}" + (f"; did you mean {near}?" if near else "")


def _mistakes(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    lines = []
    for mistake in error.errors():
        name = str(mistake["loc"][0])
        lines.append(f"{_spelled(name, origins[name])} {mistake['input']!r}: {_reason(mistake)}")
    return UsageError("; ".join(lines), "`clipft settings` shows every value and its source")


def _reason(mistake: Any) -> str:
    if mistake["type"] == "literal_error":
        annotation = Settings.model_fields[str(mistake["loc"][0])].annotation
        return _unknown_choice(str(mistake["input"]), get_args(annotation))
    message = str(mistake["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "must be").replace("a valid ", "a ")


def _spelled(name: str, origin: str) -> str:
    """A setting as its user wrote it."""
    if origin == "flag":
        return f"--{name.replace('_', '-')}"
    if origin == "environment":
        return f"{ENV_PREFIX}{name.upper()}"
    return f"{name} in {origin.removeprefix('file ')}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return (
            '"'
            + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped)
            + '"'
        )
    return repr(value)
