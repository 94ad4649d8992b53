"""What a run consists of, made once before it starts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipft.data.loader import LoaderOptions, Pairs, Preprocessing
from clipft.data.order import EpochPlan
from clipft.data.shards import PairDataset, open_pairs
from clipft.modelling.adapt import TrainableModel, adapt
from clipft.modelling.base import BaseModel, load_base
from clipft.records import Plan
from clipft.settings import Settings
from clipft.training.batch_size import FALLBACK, Found, FoundCache, ModelProbe, Probe, find
from clipft.training.contrastive import ACCUMULATIONS, Accumulation
from clipft.training.optimisation import (
    Optimiser,
    choose_optimizer,
    make_optimizer,
    one_cycle,
    parameter_groups,
    warmup_steps,
)
from clipft.training.precision import Precision, choose_precision
from clipft.training.preprocessing import (
    data_remarks,
    training_preprocessing,
    validation_preprocessing,
)

Note = Callable[[str], None]

_FEW_STEPS = 50
_ENOUGH_STEPS = 200


@dataclass(frozen=True)
class LoadedModel:
    """A base model under the scenario of some settings, on its device."""

    base: BaseModel
    fingerprint: str
    model: TrainableModel
    precision: Precision

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.base.name, "fingerprint": self.fingerprint}


def load_model(settings: Settings) -> LoadedModel:
    """Load and adapt; the adapters' first values follow from the seed."""
    precision = choose_precision(settings)
    base = load_base(settings.model)
    fingerprint = base.fingerprint()
    torch.manual_seed(settings.seed)
    model = adapt(base, settings.declared_scenario, settings)
    return LoadedModel(base, fingerprint, model.to(precision.device), precision)


def find_micro_batch(
    settings: Settings, loaded: LoadedModel, effective: int, report: Callable[[Probe], None]
) -> Found:
    """Search the micro-batch for an effective batch, or take what was found before."""
    device = loaded.precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    inputs = loaded.base.inputs
    probe = ModelProbe(loaded.model, inputs.image_size, inputs.context_length, loaded.precision)
    key = "|".join(
        map(
            str,
            (
                loaded.fingerprint,
                settings.scenario,
                settings.lora_r,
                loaded.precision.name,
                name,
                torch.get_num_threads(),
                effective,
                torch.__version__,
            ),
        )
    )
    cache = FoundCache()
    found = cache.get(key)
    if found is None:
        found = find(probe, effective, report)
        cache.put(key, found)
    return found


@dataclass(frozen=True)
class RunSetup:
    """Everything of a run but its state."""

    settings: Settings
    loaded: LoadedModel
    train: Pairs
    val: PairDataset
    preprocessing: Preprocessing
    val_preprocessing: Preprocessing
    epoch_plan: EpochPlan
    plan: Plan

    @property
    def loader_options(self) -> LoaderOptions:
        on_gpu = self.loaded.precision.device.type == "cuda"
        return LoaderOptions(self.settings.num_workers, pin_memory=on_gpu)

    def make_optimiser(self) -> Optimiser:
        settings, precision = self.settings, self.loaded.precision
        groups = parameter_groups(self.loaded.model.trainable(), settings.wd)
        name = self.plan.optimizer
        optimizer = make_optimizer(name, groups, settings.lr, precision.device)
        total, warmup = self.plan.total_steps, self.plan.warmup_steps
        scheduler = one_cycle(optimizer, settings.lr, total, warmup)
        return Optimiser(optimizer, scheduler, precision.make_scaler(), settings.grad_clip)

    def make_accumulation(self, optimiser: Optimiser) -> Accumulation:
        accumulate = ACCUMULATIONS[self.settings.accumulation]
        loaded = self.loaded
        return accumulate(loaded.model, loaded.precision, optimiser.scaler, self.settings.seed)


def prepare(settings: Settings, note: Note) -> RunSetup:
    """Open the data, load the model, choose the micro-batch, lay the plan.

    Raises:
        DataError, ModelError, UsageError: what is missing, before anything has started.
    """
    train = _open_training(settings)
    val = open_pairs(settings.data_dir / "val", settings.max_val_pairs)
    loaded = load_model(settings)
    preprocessing = training_preprocessing(loaded.base.inputs, train, settings, note)
    val_preprocessing = validation_preprocessing(loaded.base.inputs, val, settings)
    effective = min(settings.effective_batch_size, len(train))
    trains = settings.declared_scenario.trains
    micro = _micro_batch(settings, loaded, effective, note) if trains else effective
    epoch_plan = EpochPlan(len(train), effective, micro, settings.seed)
    epochs = settings.epochs if trains else 0
    parameters = loaded.model.parameters_count()
    steps = epoch_plan.steps
    remarks = []
    if trains:
        captions = (preprocessing.captions, val_preprocessing.captions)
        remarks += _step_remarks(settings, epoch_plan, len(train))
        remarks += data_remarks(train, val, captions, loaded.base.inputs.context_length)
    plan = Plan(
        scenario=settings.scenario,
        model=settings.model,
        parameters=str(parameters),
        trainable_parameters=parameters.trainable,
        train_pairs=len(train),
        val_pairs=len(val),
        epochs=epochs,
        steps_per_epoch=steps,
        warmup_steps=warmup_steps(settings.warmup_steps, epochs * steps),
        effective_batch_size=effective,
        micro_batch_size=micro,
        device=str(loaded.precision.device),
        precision=loaded.precision.name,
        optimizer=choose_optimizer(settings, loaded.precision.device, parameters.trainable),
        notes=tuple(remarks),
    )
    return RunSetup(
        settings, loaded, train, val, preprocessing, val_preprocessing, epoch_plan, plan
    )


def _open_training(settings: Settings) -> Pairs:
    folder = settings.data_dir / "train"
    if settings.stream:
        from clipft.data.stream import open_stream  # webdataset takes its time to import

        return open_stream(folder, settings.shuffle_buffer, settings.max_train_pairs)
    return open_pairs(folder, settings.max_train_pairs)


def _micro_batch(settings: Settings, loaded: LoadedModel, effective: int, note: Note) -> int:
    if settings.micro_batch_size:
        return min(settings.micro_batch_size, effective)
    if loaded.precision.device.type == "mps":  # its memory cannot be measured
        return min(FALLBACK, effective)
    note("Finding the micro-batch size (done once per model, scenario and machine) ...")
    found = find_micro_batch(settings, loaded, effective, lambda probe: None)
    return found.chosen


def _step_remarks(settings: Settings, plan: EpochPlan, pairs: int) -> list[str]:
    """What a user should know of the steps before the run."""
    remarks = []
    if settings.effective_batch_size > pairs:
        remarks.append(
            f"effective batch {settings.effective_batch_size} is more than the {pairs} "
            f"training pairs: each step takes them all"
        )
    steps = plan.steps * settings.epochs
    if steps < _FEW_STEPS and not settings.mini_train:
        remarks.append(
            f"only {steps} optimizer steps in the whole run, too few to learn much: "
            f"{_smaller_batch(plan, settings.epochs)}more --epochs give more"
        )
    first, last = plan.bounds[-1]
    if last - first != plan.effective:
        remarks.append(f"the last step of each epoch takes {last - first} pairs")
    return remarks


def _smaller_batch(plan: EpochPlan, epochs: int) -> str:
    """The power of two that makes about ``_ENOUGH_STEPS`` steps, where it is smaller."""
    wanted = max(8, plan.pairs * epochs // _ENOUGH_STEPS)
    power = 1 << (wanted.bit_length() - 1)
    return f"--effective-batch-size {power} or " if power < plan.effective else ""
