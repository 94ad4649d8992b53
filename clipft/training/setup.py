"""What a run consists of, made once before its first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress, counted, silent
from clipft.core.errors import UsageError
from clipft.core.memory import MemoryBudget
from clipft.data.captions.metadata import check_chosen_fields, check_label_options
from clipft.data.captions.template import CaptionTemplate
from clipft.data.decoding import Preprocessing
from clipft.data.few_shot import label_remarks, training_pairs
from clipft.data.loader import LoaderOptions, Pairs, StepBatch, one_ahead, training_batches
from clipft.data.order import EpochPlan, Integers, Position, Share
from clipft.data.positives import Positives, make_positives, product_ids
from clipft.data.shards.dataset import PairDataset, general_pairs, open_pairs
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import (
    on_all_ranks,
    on_rank_zero,
    rank_zero_first,
    steps_in_lockstep,
)
from clipft.distributed.step_channel import open_channel
from clipft.embedding.embed import Embeddings
from clipft.embedding.encoding import (
    Encoding,
    data_remarks,
    evaluation_batch,
    open_encoding,
    training_preprocessing,
    validation_preprocessing,
)
from clipft.embedding.load import LoadedModel, load_model
from clipft.embedding.look_alikes import look_alikes
from clipft.embedding.towers import Tower, choose_shapes, make_towers
from clipft.evaluation.request import general_settings
from clipft.models.device import keep_precision
from clipft.models.pretrained import load_inputs
from clipft.runs.records import NEW_RUN, Choices, Plan
from clipft.training.plan import even_micro_batch, lay_plan, micro_batch, step_remarks
from clipft.training.state import TrainState
from clipft.training.step.average import NO_AVERAGE, MovingAverage, WeightAverage
from clipft.training.step.fsdp import check_sharding, hold_weights, will_shard
from clipft.training.step.general_set import NOTHING_HELD, Held, open_held
from clipft.training.step.gradcache import ACCUMULATIONS, Accumulation
from clipft.training.step.losses import ContrastiveLoss, make_loss
from clipft.training.step.oom import EndsRun, Recovery, SmallerPieces
from clipft.training.step.optimizer import (
    Optimizer,
    choose_optimizer,
    make_adamw,
    one_cycle,
    parameter_groups,
)
from clipft.training.step.tower_pass import GraphMemory
from clipft.training.step.weights import Weights

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run is made of, except its state.

    ``products`` and ``val_products`` hold the product of each pair, int64 [pairs], if its photos
    attract each other.
    """

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
    weights: Weights
    products: Tensor | None = None
    val_products: Tensor | None = None
    held: Held = NOTHING_HELD

    @property
    def choices(self) -> Choices:
        """What a resumed run keeps of what this one decided for itself."""
        plan, look_alikes = self.plan, self.epoch_plan.look_alikes
        return Choices(
            plan.precision,
            plan.optimizer,
            self.epoch_plan.smallest_step,
            None if look_alikes is None else torch.from_numpy(look_alikes),
        )

    @property
    def loader_options(self) -> LoaderOptions:
        processes, device = self.processes, self.loaded.precision.device
        share = Share(processes.rank, processes.world_size)
        return LoaderOptions.from_settings(self.settings, device, share, processes.local_world_size)

    def step_batches(
        self,
        start: Position,
        check: Callable[[], None] = lambda: None,
        start_to_copy: Callable[[StepBatch], None] = lambda batch: None,
    ) -> Iterator[StepBatch]:
        """This process's part of each step from ``start`` to the end of the last epoch.

        ``pairs`` and ``skipped`` of a batch are those of all processes. ``check`` is called before
        each step; what it raises is raised on all processes. ``start_to_copy``: see the loop's
        ``step_batches``.
        """
        batches = training_batches(
            self.train,
            self.encoding.preprocessing,
            self.epoch_plan,
            start,
            self.plan.epochs,
            self.loader_options,
        )
        if self.held.general:
            done = start.epoch * self.epoch_plan.steps + start.step
            batches = self.held.general.beside(
                batches, done, self.plan.total_steps, self.loader_options
            )
        if self.loaded.precision.device.type == "cuda":
            batches = one_ahead(batches, start_to_copy)
        return steps_in_lockstep(self.processes, batches, check)

    def make_optimizer(self) -> Optimizer:
        """The optimizer of this run, before its first step."""
        settings, precision = self.settings, self.loaded.precision
        groups = parameter_groups(self.loaded.model, settings)
        for group in groups:
            group["params"] = [self.weights.own(parameter) for parameter in group["params"]]
        adamw = make_adamw(self.plan.optimizer, groups, precision.device)
        scheduler = one_cycle(adamw, self.plan.total_steps, self.plan.warmup_steps)
        scaler = self.weights.make_scaler(precision)
        return Optimizer(adamw, scheduler, scaler, settings.grad_clip, self.weights)

    def make_state(self) -> TrainState:
        """The state of this run before its first step."""
        model = self.loaded.model
        average: WeightAverage = NO_AVERAGE
        if self.settings.ema:
            own = [self.weights.own(parameter) for _, parameter in model.trainable()]
            average = MovingAverage(own, self.settings.ema)
        return TrainState(model, self.make_optimizer(), self.epoch_plan.steps, average)

    def make_accumulation(self, optimizer: Optimizer, note: Note) -> Accumulation:
        """What computes the gradient of each step, and deals with running out of memory."""

        def budget() -> MemoryBudget:
            if self.settings.graph_memory is not None:
                return MemoryBudget(self.settings.graph_memory * 2**30, over_graph=1.0)
            trainable = sum(self.weights.own(p).nbytes for _, p in self.loaded.model.trainable())
            # The first step adds a gradient and AdamW's two moments
            device, sharers = self.loaded.precision.device, self.processes.local_world_size
            return MemoryBudget.now(device, to_come=3 * trainable, sharers=sharers)

        graphs = GraphMemory(budget, self.weights.fewest)
        channel = open_channel(self.processes, sum(1 for _ in self.loaded.model.trainable()))
        kind = ACCUMULATIONS[self.settings.accumulation]
        recovery: Recovery = EndsRun()
        if not self.weights.sharded:
            recovery = SmallerPieces(
                halve_graphs=graphs.halve,
                model=self.loaded.model,
                channel=channel,
                smallest=kind.smallest_micro_batch,
                consequence=kind.if_smaller,
                micro=self.plan.micro_batch_size,
                note=note,
            )
        return kind(
            model=self.loaded.model,
            towers=self.encoding.towers,
            loss=self.loss,
            positives=self.positives,
            products=self.products,
            channel=channel,
            scaler=optimizer.scaler,
            graphs=graphs,
            weights=self.weights,
            recovery=recovery,
            preservation=self.held.preservation,
        )

    def text_tower(self) -> Tower:
        """The text tower itself, where ``val_encoding`` may know the features of captions only."""
        pad_token_id = self.val_preprocessing.captions.pad_token_id
        towers = make_towers(self.loaded, self.settings.seed, pad_token_id)
        return self.weights.wrap_towers(towers).texts

    @property
    def validation_batch(self) -> int:
        """The number of validation pairs that pass through the towers together."""
        return validation_batch(self.settings, self.loaded, self.plan.micro_batch_size)

    @torch.no_grad()
    def validation_loss(self, embedded: Embeddings) -> float:
        """The training loss over the whole validation set as one batch. If pairs have several
        captions, it is the mean over batches in which each of them has its turn."""
        device = self.loaded.precision.device
        images, products = embedded.images.to(device), self._products_of(embedded)
        return fmean(
            float(self.loss(images, one.texts.to(device), one.groups, products))
            for one in embedded.rounds()
        )

    def loss_lower_bound(self, embedded: Embeddings) -> float:
        """The smallest value that ``validation_loss`` can have."""
        products = self._products_of(embedded)
        return fmean(self.loss.lower_bound(one.groups, products) for one in embedded.rounds())

    def _products_of(self, embedded: Embeddings) -> Tensor | None:
        return None if self.val_products is None else self.val_products[list(embedded.numbers)]


def validation_batch(settings: Settings, loaded: LoadedModel, micro: int) -> int:
    """The number of validation pairs that pass through the towers together.

    On a GPU that is a micro-batch, which is known to fit. A CPU is no faster with more.
    """
    device = loaded.precision.device
    return micro if device.type == "cuda" else evaluation_batch(settings, device)


def prepare(
    settings: Settings,
    note: Note,
    processes: Processes,
    progress: Progress = silent,
    source: "ShardSource | None" = None,
    began: Choices = NEW_RUN,
) -> RunSetup:
    """Open the data, load the model, choose the micro-batch and make the plan.

    ``began`` is what a run that is resumed decided when it began.

    Every process ends with the same setup. Work that leaves something in the cache folder is done
    by one process of each machine first, so that the others find it there.

    Raises:
        DataError: pairs are missing or cannot be used.
        ModelError: the base model cannot be loaded, or does not fit the scenario.
        UsageError: settings do not fit each other or the data.
    """
    check_sharding(settings)
    check_label_options(settings)
    data = rank_zero_first(processes, lambda: _open_data(settings, note, processes, source))
    train, val = data.train, data.val
    precision = keep_precision(settings, began.precision, note).name
    here = settings.model_copy(update={"precision": precision})
    loaded = _load_everywhere(here, train, processes, note)
    products = product_ids(settings, train, note)
    epoch_plan = _plan_epochs(settings, loaded, train, processes, began, note)
    if products is not None:
        found = _look_alikes(settings, train, products, processes, began, progress)
        epoch_plan = replace(
            epoch_plan,
            products=products.numpy() if settings.photo_pairs else None,
            look_alikes=found,
            hard_negatives=settings.hard_negatives,
        )
    trains = settings.declared_scenario.trains
    notes = [*step_remarks(settings, epoch_plan), *data.remarks] if trains else []
    weights = hold_weights(settings, loaded, processes, note)
    optimizer = _agreed_optimizer(settings, loaded, processes, weights, began, note)

    count = processes.world_size
    own = -(-epoch_plan.effective // count)

    def opened(
        model: LoadedModel, pairs: Pairs, preprocessing: Preprocessing, *sizes: int
    ) -> Encoding:
        shapes = choose_shapes(model, settings.compile, *(sizes or (epoch_plan.micro, own)))
        found = open_encoding(model, pairs, preprocessing, settings, note, shapes, progress)
        # The pretrained model is whole on each process
        towers = weights.wrap_towers(found.towers) if model is loaded else found.towers
        return replace(found, towers=towers)

    def open_all() -> tuple[Encoding, Encoding, Held]:
        at_once = validation_batch(settings, loaded, epoch_plan.micro)
        return (
            opened(loaded, train, data.preprocessing),
            opened(loaded, val, data.val_preprocessing, at_once, at_once),
            open_held(here, loaded, (train, data.preprocessing), data.general, epoch_plan, opened),
        )

    encoding, val_encoding, held = rank_zero_first(processes, open_all)
    pad_token_id = data.preprocessing.captions.pad_token_id
    return RunSetup(
        settings=settings,
        loaded=loaded,
        train=train,
        val=val,
        encoding=encoding,
        val_encoding=val_encoding,
        val_preprocessing=data.val_preprocessing,
        positives=make_positives(settings, train, pad_token_id, note),
        val_positives=make_positives(settings, val, pad_token_id, note),
        products=products if settings.photo_pairs else None,
        val_products=product_ids(settings, val, note) if settings.photo_pairs else None,
        loss=make_loss(settings, loaded.model),
        epoch_plan=epoch_plan,
        plan=lay_plan(settings, loaded, epoch_plan, len(val), count, notes, optimizer),
        processes=processes,
        weights=weights,
        held=held,
    )


def _plan_epochs(
    settings: Settings,
    loaded: LoadedModel,
    train: Pairs,
    processes: Processes,
    began: Choices,
    note: Note,
) -> EpochPlan:
    """Choose the micro-batch and divide an epoch into steps; alike on all processes."""
    micro = effective = min(settings.effective_batch_size, len(train))
    if settings.declared_scenario.trains:
        most, beside = -(-effective // processes.world_size), processes.local_world_size
        sharding = will_shard(settings, processes)
        found = on_rank_zero(  # measured on one process: others would take its memory
            processes, lambda: micro_batch(settings, loaded, most, note, beside, sharding)
        )
        micro = even_micro_batch(effective, found, processes.world_size)
    return EpochPlan(len(train), effective, micro, settings.seed, began.smallest_step)


def _look_alikes(
    settings: Settings,
    train: Pairs,
    products: Tensor,
    processes: Processes,
    began: Choices,
    progress: Progress,
) -> Integers | None:
    """The look-alikes of each training image: those that the run began with, or new ones."""
    if not settings.hard_negatives:
        return None
    found = began.look_alikes
    if found is None:
        assert isinstance(train, PairDataset)
        found = on_rank_zero(processes, lambda: look_alikes(settings, train, products, progress))
    known: Integers = found.numpy()
    return known


def _agreed_optimizer(
    settings: Settings,
    loaded: LoadedModel,
    processes: Processes,
    weights: Weights,
    began: Choices,
    note: Note,
) -> str:
    """The optimizer of all processes: AdamW if only some of them can use the 8-bit one."""
    if not settings.declared_scenario.trains:
        return "adamw"
    trainable, device = loaded.model.parameters_count().trainable, loaded.precision.device

    def choose() -> str:
        return choose_optimizer(settings, device, trainable, weights.sharded, began.optimizer, note)

    chosen = processes.gather_objects(on_all_ranks(processes, choose))
    return chosen[0] if len(set(chosen)) == 1 else "adamw"


@dataclass(frozen=True)
class _Data:
    """The pairs of a run and their captions; ``general`` are those of ``--preserve-data``, and
    ``remarks`` are only made by rank zero."""

    train: Pairs
    val: PairDataset
    preprocessing: Preprocessing
    val_preprocessing: Preprocessing
    general: tuple[PairDataset, Preprocessing] | None
    remarks: list[str]


def _open_data(
    settings: Settings, note: Note, processes: Processes, source: "ShardSource | None"
) -> _Data:
    general_set = general_pairs(settings)
    folder = settings.data_dir / "train"
    if settings.stream:
        from clipft.data.shards.stream import open_stream  # webdataset takes its time to import

        train: Pairs = open_stream(
            source or folder, settings.shuffle_buffer, settings.max_train_pairs
        )
    else:
        train = training_pairs(settings)
    val = open_pairs(settings.data_dir / "val", settings.max_val_pairs)
    check_chosen_fields(settings, val)
    inputs = load_inputs(settings.model, settings.input_sizes)
    preprocessing = training_preprocessing(inputs, train, settings, note)
    val_preprocessing = validation_preprocessing(inputs, val, settings)
    general = None
    if general_set and settings.preserve_data:
        plain = general_settings(settings, settings.preserve_data)
        general = general_set, validation_preprocessing(inputs, general_set, plain)
    remarks = list[str]()
    if settings.declared_scenario.trains and processes.rank == 0:
        captions = (preprocessing.captions, val_preprocessing.captions)
        remarks = data_remarks(train, val, captions, inputs.context_length)
        if 0 < settings.evaluation_queries < len(val):
            remarks.append(
                f"validation has {settings.evaluation_queries:,} of {counted(len(val), 'pair')} as "
                "queries; --evaluation-queries 0 takes all"
            )
        if settings.fields:
            field = CaptionTemplate.of(settings).first
            remarks.append(
                f"captions are drawn from {settings.fields}; validation measures {field}"
            )
        if settings.label_prompts and isinstance(train, PairDataset):
            remarks += label_remarks(train, val, settings.label_field)
    return _Data(train, val, preprocessing, val_preprocessing, general, remarks)


def _load_everywhere(
    settings: Settings, train: Pairs, processes: Processes, note: Note
) -> LoadedModel:
    """Load the model on all processes.

    Raises:
        ModelError: the base model cannot be loaded, or does not fit the scenario.
        UsageError: the processes have different models or pairs.
    """
    loaded = on_all_ranks(processes, lambda: load_model(settings))
    _check_same_everywhere(processes, loaded, train)
    for remark in loaded.base.remarks():
        note(remark)
    return loaded


def _check_same_everywhere(processes: Processes, loaded: LoadedModel, train: Pairs) -> None:
    """Compare the model and the pairs of all processes, which may be on several machines.

    Raises:
        UsageError: they differ.
    """
    ours = {"model": loaded.fingerprint, "set of training pairs": train.identity()}
    for rank, theirs in enumerate(processes.gather_objects(ours)):
        differing = [what for what in ours if theirs[what] != ours[what]]
        if differing:
            raise UsageError(
                f"process {rank} has another {differing[0]} than process {processes.rank}",
                "give all machines the same model folder and the same shards",
            )
