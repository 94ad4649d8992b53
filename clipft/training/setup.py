"""What a run consists of, made once before it starts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clipft.data.loader import LoaderOptions, Pairs, Preprocessing
from clipft.data.order import EpochPlan, Share
from clipft.data.shards import PairDataset, open_pairs
from clipft.errors import UsageError
from clipft.machine import processors
from clipft.records import Plan
from clipft.settings import Settings
from clipft.training.batch_size import FALLBACK, Found, FoundCache, Probe
from clipft.training.contrastive import ACCUMULATIONS, Accumulation
from clipft.training.distributed import Processes, by_first, first_then_all, together
from clipft.training.embedding import Embeddings
from clipft.training.encoding import Encoding, open_encoding
from clipft.training.feature_cache import Progress, silent
from clipft.training.graphs import GraphMemory
from clipft.training.loaded import LoadedModel, load_model
from clipft.training.losses import ContrastiveLoss, make_loss
from clipft.training.memory import free_for_graphs, memory_in_use, usable_memory
from clipft.training.optimisation import (
    Optimiser,
    choose_optimizer,
    make_optimizer,
    one_cycle,
    parameter_groups,
    warmup_steps,
)
from clipft.training.positives import Positives, make_positives
from clipft.training.preprocessing import (
    data_remarks,
    training_preprocessing,
    validation_preprocessing,
)
from clipft.training.probing import find, probe_of
from clipft.training.shrinking import ShrinkingAccumulation

if TYPE_CHECKING:
    from clipft.data.stream import ShardSource

Note = Callable[[str], None]

_FEW_STEPS = 50
_ENOUGH_STEPS = 200
_EASY = 0.8
"""Of the free memory of a CPU, for a micro-batch: a run holds more than a step."""
_STATES = 4
"""Of the trainable weights' bytes, that a first step adds: gradient, two moments, one to spare."""


def find_micro_batch(
    settings: Settings,
    loaded: LoadedModel,
    effective: int,
    report: Callable[[Probe], None],
    processes: int = 1,
) -> Found:
    """Search the micro-batch for an effective batch, or take what was found before;
    ``processes`` share the machine."""
    device = loaded.precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    key = "|".join(
        map(
            str,
            (
                loaded.fingerprint,
                settings.scenario,
                settings.lora_r,
                settings.lora_targets,
                settings.lora_dora,
                settings.gradient_checkpointing,
                loaded.precision.name,
                name,
                torch.get_num_threads(),
                effective,
                processes,
                torch.__version__,
            ),
        )
    )
    cache = FoundCache()
    found = cache.get(key)
    if found is None:
        found = find(probe_of(loaded, settings), effective, report, processes)
        cache.put(key, found)
    return found


@dataclass(frozen=True)
class RunSetup:
    """Everything of a run but its state."""

    settings: Settings
    loaded: LoadedModel
    train: Pairs
    val: PairDataset
    encoding: Encoding
    val_encoding: Encoding
    val_preprocessing: Preprocessing
    positives: Positives
    val_positives: Positives
    loss: ContrastiveLoss
    epoch_plan: EpochPlan
    plan: Plan
    processes: Processes

    @property
    def loader_options(self) -> LoaderOptions:
        """Of the machine's processors each process takes its part."""
        processes = self.processes
        workers = min(self.settings.num_workers, max(1, processors() // processes.on_this_machine))
        on_gpu = self.loaded.precision.device.type == "cuda"
        return LoaderOptions(workers, on_gpu, Share(processes.rank, processes.count))

    def make_optimiser(self) -> Optimiser:
        settings, precision = self.settings, self.loaded.precision
        groups = parameter_groups(self.loaded.model, settings)
        optimizer = make_optimizer(self.plan.optimizer, groups, precision.device)
        total, warmup = self.plan.total_steps, self.plan.warmup_steps
        scheduler = one_cycle(optimizer, total, warmup)
        return Optimiser(optimizer, scheduler, precision.make_scaler(), settings.grad_clip)

    def make_accumulation(self, optimiser: Optimiser, note: Note) -> Accumulation:
        model, settings = self.loaded.model, self.settings
        graphs = GraphMemory(self._graph_bytes)
        accumulate = ACCUMULATIONS[settings.accumulation](
            model=model,
            sides=self.encoding.sides,
            loss=self.loss,
            positives=self.positives,
            processes=self.processes,
            scaler=optimiser.scaler,
            graphs=graphs,
        )
        micro = self.plan.micro_batch_size
        return ShrinkingAccumulation(accumulate, graphs, model, self.processes, micro, note)

    @torch.no_grad()
    def validation_loss(self, embedded: Embeddings) -> float:
        """The training loss over the whole validation set as one batch."""
        device = self.loaded.precision.device
        images, texts = embedded.images.to(device), embedded.texts.to(device)
        return float(self.loss(images, texts, embedded.groups))

    def _graph_bytes(self) -> int:
        """What graphs may hold, asked once in the first step."""
        if self.settings.graph_memory is not None:
            return int(self.settings.graph_memory * 2**30)
        trainable = sum(p.nbytes for _, p in self.loaded.model.trainable())
        free = free_for_graphs(self.loaded.precision.device, to_come=_STATES * trainable)
        return free // self.processes.on_this_machine


def prepare(
    settings: Settings,
    note: Note,
    processes: Processes,
    progress: Progress = silent,
    source: "ShardSource | None" = None,
) -> RunSetup:
    """Open the data, load the model, choose the micro-batch, lay the plan: all processes the
    same.

    Raises:
        DataError, ModelError, UsageError: what is missing, before anything has started.
    """
    train = first_then_all(processes, lambda: _open_training(settings, source))
    val = first_then_all(
        processes, lambda: open_pairs(settings.data_dir / "val", settings.max_val_pairs)
    )
    loaded = together(processes, lambda: load_model(settings))
    _check_same_everywhere(processes, loaded, train)
    inputs = loaded.base.inputs
    preprocessing = first_then_all(
        processes, lambda: training_preprocessing(inputs, train, settings, note)
    )
    val_preprocessing = first_then_all(
        processes, lambda: validation_preprocessing(inputs, val, settings)
    )
    effective = min(settings.effective_batch_size, len(train))
    trains = settings.declared_scenario.trains
    micro = effective
    if trains:
        most, beside = -(-effective // processes.count), processes.on_this_machine
        found = by_first(processes, lambda: _micro_batch(settings, loaded, most, note, beside))
        micro = even_micro_batch(effective, found, processes.count)
    epoch_plan = EpochPlan(len(train), effective, micro, settings.seed)
    epochs = settings.epochs if trains else 0
    parameters = loaded.model.parameters_count()
    steps = epoch_plan.steps
    remarks = []
    if trains:
        captions = (preprocessing.captions, val_preprocessing.captions)
        remarks += _step_remarks(settings, epoch_plan, len(train))
        context = inputs.context_length
        remarks += by_first(processes, lambda: data_remarks(train, val, captions, context))
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
        processes=processes.count,
    )
    tell = (note, progress)
    encoding = first_then_all(
        processes, lambda: open_encoding(loaded, train, preprocessing, settings, *tell)
    )
    val_encoding = first_then_all(
        processes, lambda: open_encoding(loaded, val, val_preprocessing, settings, *tell)
    )
    return RunSetup(
        settings=settings,
        loaded=loaded,
        train=train,
        val=val,
        encoding=encoding,
        val_encoding=val_encoding,
        val_preprocessing=val_preprocessing,
        positives=make_positives(settings, train, preprocessing.captions.end, note),
        val_positives=make_positives(settings, val, preprocessing.captions.end, note),
        loss=make_loss(settings, loaded.model),
        epoch_plan=epoch_plan,
        plan=plan,
        processes=processes,
    )


def _check_same_everywhere(processes: Processes, loaded: LoadedModel, train: Pairs) -> None:
    """
    Raises:
        UsageError: a process, on another machine perhaps, has another model or other pairs.
    """
    ours = {"model": loaded.fingerprint, "set of training pairs": train.identity()}
    for rank, theirs in enumerate(processes.gather_objects(ours)):
        differing = [what for what in ours if theirs[what] != ours[what]]
        if differing:
            raise UsageError(
                f"process {rank} has another {differing[0]} than process {processes.rank}",
                "give all machines the same model folder and the same shards",
            )


def even_micro_batch(effective: int, micro: int, processes: int) -> int:
    """The largest micro-batch up to ``micro`` of which each process has equally many."""
    if processes == 1:
        return micro
    share = -(-effective // processes)
    return -(-share // -(-share // micro))


def _open_training(settings: Settings, source: "ShardSource | None") -> Pairs:
    folder = settings.data_dir / "train"
    if settings.stream:
        from clipft.data.stream import open_stream  # webdataset takes its time to import

        return open_stream(source or folder, settings.shuffle_buffer, settings.max_train_pairs)
    return open_pairs(folder, settings.max_train_pairs)


def _micro_batch(
    settings: Settings, loaded: LoadedModel, effective: int, note: Note, processes: int
) -> int:
    if settings.micro_batch_size:
        asked = min(settings.micro_batch_size, effective)
        return _within_memory(asked, settings, loaded, note, processes)
    if loaded.precision.device.type == "mps":  # its memory cannot be measured
        return min(FALLBACK, effective)
    note("Finding the micro-batch size (done once per model, scenario and machine) ...")
    found = find_micro_batch(settings, loaded, effective, lambda probe: None, processes)
    return found.chosen


def _within_memory(
    asked: int, settings: Settings, loaded: LoadedModel, note: Note, processes: int
) -> int:
    """A CPU's memory is not refused, its process is killed: so no more than it holds."""
    device = loaded.precision.device
    if device.type != "cpu":
        return asked
    free = (usable_memory(device, processes) - memory_in_use(device)) * _EASY
    each = probe_of(loaded, settings).bytes_per_pair()
    if asked * each <= free:
        return asked
    fitting = max(1, int(free / each))
    note(
        f"warning: micro-batches of {asked} would take about {asked * each / 2**30:.1f} GiB of "
        f"the {free / 2**30:.1f} that are free: taking {fitting}. The loss stays the same."
    )
    return fitting


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
