"""The settings that a search may change, and their values.

A search changes settings that the user has not set. Each parameter of a trial has the name of its
setting. Learning rates are given as multiples of the default rate for the scenario and the model,
so that a good value in one scenario is a good guess in another. The rate of the projections is a
multiple of the trial's own rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings, load_settings
from clipft.core.errors import UsageError, unknown_choice
from clipft.data.captions.fields import WithMetadata, field_names, field_value
from clipft.models.source import own_learning_rates

Parameters = Mapping[str, Any]
"""The values of a trial by setting. Learning rates are multiples of their default."""

RATES = ("lr", "lr_projections")
_RATE_RANGE = (1 / 64, 64.0)
_RATES_AROUND = 4.0
"""The sampler chooses rates between a quarter and four times that of the best trial."""
_DECAYS = (0.0, 0.9, 0.99)
_ROUNDED = frozenset((*RATES, "lora_dropout", "wd", "layer_decay"))
_SMALLEST_BATCH = 16
_MOST_FIELDS = 4
_LONGEST_FIELD = 60
"""The most characters in the value of an attribute. Longer values are descriptions."""
_SAMPLED = 64
"""Pairs whose metadata is read to find fields for captions."""

SEARCHED = (
    *("scenario", "lr", "lr_projections", "lora_targets", "lora_r", "lora_dropout", "wd"),
    *("effective_batch_size", "epochs", "ema", "augmentation", "positives"),
    "caption",
)
"""The settings that are searched unless the user names others."""

SEARCHABLE = (*SEARCHED, "layer_decay", "logit_scale", "loss")
"""All settings that can be searched. The last ones rarely help, so they are not in ``SEARCHED``."""


@dataclass(frozen=True)
class Space:
    """The settings that are searched, and the run that the search begins from.

    Attributes:
        base: the run without any change, as plain ``clipft train`` would do it.
        given: the settings that the user has set, by name.
        names: the settings that are searched, in the order of ``SEARCHABLE``.
        pairs: the number of training pairs.
        captions: the caption templates to choose from, the user's own first.
    """

    base: LoadedSettings
    given: Mapping[str, Any]
    names: tuple[str, ...]
    pairs: int
    captions: tuple[str, ...] = ()

    def default(self) -> dict[str, Any]:
        """The parameters of the run without any change."""
        settings = self.base.values
        values = {name: getattr(settings, name) for name in self.names if name not in RATES}
        return self.completed(values | {"scenario": settings.scenario})

    def completed(self, parameters: Parameters) -> dict[str, Any]:
        """Add the parameters that are missing, and leave out those that the scenario ignores."""
        scenario = parameters.get("scenario", self.base.values.scenario)
        names = [name for name in self.names if _applies(name, scenario)]
        return {name: parameters.get(name, _standard(name)) for name in names}

    def allows(self, name: str, value: Any) -> bool:
        """Return whether a searched setting may have this value."""
        if name in RATES:
            return _RATE_RANGE[0] <= float(value) <= _RATE_RANGE[1]
        if name == "epochs":
            return bool(self.fewest_epochs <= value <= 2 * self.base.values.epochs)
        return name in ("lora_dropout", "wd", "layer_decay") or value in self.choices(name)

    def suggest(
        self, trial: Any, most_epochs: float = float("inf"), best: Parameters | None = None
    ) -> dict[str, Any]:
        """Let Optuna choose the parameters of a trial.

        Args:
            trial: the trial of Optuna.
            most_epochs: the most epochs that there is time for.
            best: the parameters of the best trial so far, whose learning rates are varied.
        """
        found = dict[str, Any]()
        for name in self.names:
            scenario = found.get("scenario", self.base.values.scenario)
            if name in RATES and _applies(name, scenario):
                found[name] = _choose_rate(name, trial, (best or {}).get(name, 1.0))
            elif _applies(name, scenario):
                found[name] = self._choose(name, trial, most_epochs)
        return found

    def _choose(self, name: str, trial: Any, most_epochs: float) -> Any:
        base = self.base.values
        if name == "epochs":
            high = int(min(2 * base.epochs, max(most_epochs, self.fewest_epochs)))
            # A move may ask for more epochs, and Optuna would accept them
            return min(high, trial.suggest_int(name, self.fewest_epochs, high, log=True))
        if name == "lora_dropout":
            return trial.suggest_float(name, 0.0, 0.5, step=0.05)
        if name == "wd":
            return trial.suggest_float(name, 0.01, 1.0, log=True)
        if name == "layer_decay":
            return trial.suggest_float(name, 0.6, 1.0, step=0.05)
        return trial.suggest_categorical(name, self.choices(name))

    @property
    def fewest_epochs(self) -> int:
        """The fewest epochs of a trial."""
        epochs = self.base.values.epochs
        return max(1, epochs // 2) if "epochs" in self.names else epochs

    def choices(self, name: str) -> Sequence[Any]:
        """The values of a setting that is chosen from a list."""
        base = self.base.values
        if name == "scenario":
            return [name for name, scenario in SCENARIOS.items() if scenario.trains]
        if name == "effective_batch_size":
            own = base.effective_batch_size
            sizes = [own // 4, own // 2, 2 * own, 4 * own]
            most = max(own, self.pairs // 2)
            return sorted({own, *(size for size in sizes if _SMALLEST_BATCH <= size <= most)})
        if name == "positives":
            return ["pair", "caption", *(["group"] if base.group_field else [])]
        if name == "ema":
            return sorted({*_DECAYS, base.ema})
        listed: dict[str, Sequence[Any]] = {
            "lora_targets": ("qv", "qkvo", "mlp", "all"),
            "lora_r": (4, 8, 16, 32, 64),
            "augmentation": ("none", "simple", "advanced"),
            "logit_scale": ("auto", "frozen", "trained"),
            "loss": ("auto", "clip", "siglip"),
            "caption": self.captions,
        }
        return listed[name]

    def changes(self, parameters: Parameters) -> dict[str, Any]:
        """Return the settings that a trial changes; empty for the default parameters."""
        default, base = self.default(), self.base.values
        rounded = {n: _rounded(v) if n in _ROUNDED else v for n, v in parameters.items()}
        changed = {n: v for n, v in rounded.items() if v != default.get(n, _standard(n))}
        rate = self.rate(parameters.get("scenario", base.scenario))
        for name in RATES:  # projections that are not mentioned follow the other weights
            rate *= rounded.get(name, 1.0)
            if name in changed:
                changed[name] = _rounded(rate)
        if "lora_r" in changed and "lora_alpha" not in self.given:
            changed["lora_alpha"] = base.lora_alpha / base.lora_r * changed["lora_r"]
        if {"epochs", "effective_batch_size"} & changed.keys():
            # Otherwise one of them would be adjusted to the other
            sizes = {n: getattr(base, n) for n in ("epochs", "effective_batch_size")}
            changed |= {n: v for n, v in sizes.items() if n not in {*self.given, *changed}}
        return changed

    def rate(self, scenario: str) -> float:
        """Return the learning rate of a scenario if the search does not change it."""
        if "lr" in self.given:
            return float(self.given["lr"])
        own = own_learning_rates(self.base.values.model)
        return own.get(scenario) or SCENARIOS[scenario].lr or Settings.model_fields["lr"].default

    def settings(self, changed: Mapping[str, Any], **own: Any) -> LoadedSettings:
        """Return the settings of a run with these changes; ``own`` has its folder and its seed."""
        fixed = {
            "enable_s3_checkpoints": False,  # they would all have the same name in the bucket
            "processes": 1,  # several trials at a time use a machine better than a distributed one
            "shard_weights": False,
        }
        return load_settings({**self.given, **changed, **fixed, **own}, environ={})


def check_searchable(wanted: Sequence[str], given: Mapping[str, Any]) -> None:
    """Check the settings that the user wants to be searched.

    Raises:
        UsageError: a setting cannot be searched, or is set and searched at once.
    """
    for name in wanted:
        if name not in SEARCHABLE:
            raise UsageError(
                f"--search {name!r}: {unknown_choice(name, SEARCHABLE)}",
                "leave --search out to search all that usually matters",
            )
        if name in given:
            raise UsageError(
                f"{name} is to be searched, but it is set to {given[name]!r} as well",
                "leave out one of the two",
            )


def open_space(
    base: LoadedSettings,
    given: Mapping[str, Any],
    wanted: Sequence[str],
    pairs: int,
    metadata: WithMetadata | None,
) -> Space:
    """Choose the settings to search, starting from a run that trains something.

    Args:
        base: the run without any change.
        given: the settings that the user has set.
        wanted: the settings to search; if empty, those of ``SEARCHED`` that the user has not set.
        pairs: the number of training pairs.
        metadata: these pairs, if their metadata can be read.

    Raises:
        UsageError: a setting cannot be searched, or is set and searched at once.
    """
    check_searchable(wanted, given)
    captions = caption_choices(base.values, metadata)
    open_names = [n for n in wanted or SEARCHED if n not in given]
    if len(captions) < 2:
        open_names = [name for name in open_names if name != "caption"]
    names = tuple(name for name in SEARCHABLE if name in open_names)
    reachable = Space(base, given, names, pairs, captions)
    scenarios = reachable.choices("scenario") if "scenario" in names else [base.values.scenario]
    used = tuple(name for name in names if any(_applies(name, s) for s in scenarios))
    if not used:
        raise UsageError(
            "there is nothing to search: every setting that a search changes is set",
            "leave some of them out, such as --lr or --epochs",
        )
    return Space(base, given, used, pairs, captions)


def caption_choices(settings: Settings, metadata: WithMetadata | None) -> tuple[str, ...]:
    """Return the caption templates to choose from; the first one is that of the settings.

    The others only add captions for training. Evaluation uses the first alternative of a template,
    so all trials are measured with the same captions.
    """
    own = settings.caption
    if "||" in own or settings.fields:  # the user has chosen the captions to train with
        return (own,)
    found = [own]
    if own.strip() == "{caption}":
        found.append("{caption} || a photo of {caption}")
    fields = _attributes(settings, metadata) if metadata else []
    if len(fields) > 1:
        found.append(f"{own} || {', '.join(f'{{{name}}}' for name in fields)}")
    return tuple(found)


def _attributes(settings: Settings, metadata: WithMetadata) -> list[str]:
    """Return the fields with a short text in half of the pairs: a name, a color, a material."""
    count = min(_SAMPLED, len(metadata))
    sample = [metadata.metadata(n * len(metadata) // count) for n in range(count)]
    names = list(dict.fromkeys(name for pair in sample for name in field_names(pair)))

    def fits(name: str) -> bool:
        values = [field_value(pair, name) for pair in sample]
        texts = [v for v in values if isinstance(v, str) and _is_attribute(v)]
        return 2 * len(texts) >= count and name not in {"caption", settings.group_field}

    return [name for name in names if fits(name)][:_MOST_FIELDS]


def _is_attribute(value: str) -> bool:
    """Return whether a value looks like a name, a color or a material: no code, path or text."""
    letters = any(character.isalpha() for character in value)
    code = " " not in value and any(character.isdigit() for character in value)
    return letters and not code and len(value) <= _LONGEST_FIELD and "/" not in value


def _choose_rate(name: str, trial: Any, best: float) -> float:
    low, high = best / _RATES_AROUND, best * _RATES_AROUND
    return float(trial.suggest_float(name, low, high, log=True))


def _applies(name: str, scenario: str) -> bool:
    """Whether a setting makes a difference in a scenario."""
    declared = SCENARIOS[scenario]
    if name.startswith("lora_"):
        return bool(declared.lora)
    if name == "lr_projections":  # if only projections are trained, it is the same as lr
        return bool(declared.lora) or declared.full
    return declared.full or name != "layer_decay"


def _standard(name: str) -> Any:
    """The default of a parameter that the base run does not use."""
    return 1.0 if name in RATES else Settings.model_fields[name].default


def _rounded(value: float) -> float:
    """Round a rate to two significant digits."""
    return float(f"{value:.2g}")


def described(changes: Mapping[str, Any]) -> str:
    """Format changes for the user: ``scenario=full lr=0.002``."""
    shown = (f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in changes.items())
    return " ".join(shown) or "the defaults"
