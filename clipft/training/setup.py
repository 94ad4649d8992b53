"""What a run consists of, made once before it starts."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress, silent
from clipft.core.errors import UsageError
from clipft.core.memory import free_for_graphs
from clipft.data.loader import LoaderOptions, Pairs, Preprocessing
from clipft.data.order import EpochPlan, Share
from clipft.data.positives import Positives, make_positives
from clipft.data.shards.dataset import PairDataset, open_pairs
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_all_ranks, on_rank_zero, rank_zero_first
from clipft.embedding.embed import Embeddings
from clipft.embedding.encoding import (
    Encoding,
    data_remarks,
    open_encoding,
    training_preprocessing,
    validation_preprocessing,
)
from clipft.embedding.load import LoadedModel, load_model
from clipft.runs.records import Plan
from clipft.training.plan import even_micro_batch, lay_plan, micro_batch, step_remarks
from clipft.training.step.fsdp import Unshrinking, check_sharding, hold_weights, to_shard
from clipft.training.step.gradcache import ACCUMULATIONS, Accumulation, ActivationBudget
from clipft.training.step.losses import ContrastiveLoss, make_loss
from clipft.training.step.oom import ShrinkingAccumulation
from clipft.training.step.optimizer import Optimiser, make_optimizer, one_cycle, parameter_groups
from clipft.training.step.weights import Weights

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource

_STATES = 4
"""Of the trainable weights' bytes, that a first step adds: gradient, two moments, one to spare."""


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
    weights: Weights

    @property
    def loader_options(self) -> LoaderOptions:
        processes, device = self.processes, self.loaded.precision.device
        share = Share(processes.rank, processes.world_size)
        return LoaderOptions.from_settings(self.settings, device, share, processes.local_world_size)

    def make_optimiser(self) -> Optimiser:
        settings, precision = self.settings, self.loaded.precision
        groups = parameter_groups(self.loaded.model, settings)
        for group in groups:
            group["params"] = [self.weights.own(parameter) for parameter in group["params"]]
        optimizer = make_optimizer(self.plan.optimizer, groups, precision.device)
        total, warmup = self.plan.total_steps, self.plan.warmup_steps
        scheduler = one_cycle(optimizer, total, warmup)
        scaler = self.weights.make_scaler(precision)
        return Optimiser(optimizer, scheduler, scaler, settings.grad_clip, self.weights)

    def make_accumulation(self, optimiser: Optimiser, note: Note) -> Accumulation:
        model, settings = self.loaded.model, self.settings
        graphs = ActivationBudget(self._graph_bytes, self.weights.agreed)
        accumulate = ACCUMULATIONS[settings.accumulation](
            model=model,
            towers=self.encoding.towers,
            loss=self.loss,
            positives=self.positives,
            processes=self.processes,
            scaler=optimiser.scaler,
            graphs=graphs,
            weights=self.weights,
        )
        if self.weights.sharded:
            return Unshrinking(accumulate)
        micro = self.plan.micro_batch_size
        cutting = accumulate.cutting
        return ShrinkingAccumulation(
            accumulate, graphs, model, self.processes, cutting, micro, note
        )

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
        trainable = sum(self.weights.own(p).nbytes for _, p in self.loaded.model.trainable())
        free = free_for_graphs(self.loaded.precision.device, to_come=_STATES * trainable)
        return free // self.processes.local_world_size


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
    check_sharding(settings)
    opened = _open(settings, note, processes, source)
    loaded, train, val = opened.loaded, opened.train, opened.val
    epoch_plan = _epoch_plan(settings, opened, note, processes)
    weights = hold_weights(settings, loaded, processes, note)
    notes = list[str]()
    if settings.declared_scenario.trains:
        notes += step_remarks(settings, epoch_plan)
        notes += on_rank_zero(processes, opened.remarks)
    tell = (note, progress)
    encoding = rank_zero_first(
        processes, lambda: open_encoding(loaded, train, opened.preprocessing, settings, *tell)
    )
    val_encoding = rank_zero_first(
        processes, lambda: open_encoding(loaded, val, opened.val_preprocessing, settings, *tell)
    )
    pad_token_id = opened.preprocessing.captions.pad_token_id
    return RunSetup(
        settings=settings,
        loaded=loaded,
        train=train,
        val=val,
        encoding=replace(encoding, towers=weights.towers(encoding.towers)),
        val_encoding=replace(val_encoding, towers=weights.towers(val_encoding.towers)),
        val_preprocessing=opened.val_preprocessing,
        positives=make_positives(settings, train, pad_token_id, note),
        val_positives=make_positives(settings, val, pad_token_id, note),
        loss=make_loss(settings, loaded.model),
        epoch_plan=epoch_plan,
        plan=lay_plan(
            settings, loaded, epoch_plan, len(val), processes.world_size, notes, weights.sharded
        ),
        processes=processes,
        weights=weights,
    )


@dataclass(frozen=True)
class _Opened:
    """The pairs and the model of a run, on each process the same."""

    train: Pairs
    val: PairDataset
    loaded: LoadedModel
    preprocessing: Preprocessing
    val_preprocessing: Preprocessing

    def remarks(self) -> list[str]:
        captions = (self.preprocessing.captions, self.val_preprocessing.captions)
        context = self.loaded.base.inputs.context_length
        return data_remarks(self.train, self.val, captions, context)


def _open(
    settings: Settings, note: Note, processes: Processes, source: "ShardSource | None"
) -> _Opened:
    train = rank_zero_first(processes, lambda: _open_training(settings, source))
    val = rank_zero_first(
        processes, lambda: open_pairs(settings.data_dir / "val", settings.max_val_pairs)
    )
    loaded = on_all_ranks(processes, lambda: load_model(settings))
    _check_same_everywhere(processes, loaded, train)
    inputs = loaded.base.inputs
    preprocessing = rank_zero_first(
        processes, lambda: training_preprocessing(inputs, train, settings, note)
    )
    val_preprocessing = rank_zero_first(
        processes, lambda: validation_preprocessing(inputs, val, settings)
    )
    return _Opened(train, val, loaded, preprocessing, val_preprocessing)


def _epoch_plan(settings: Settings, opened: _Opened, note: Note, processes: Processes) -> EpochPlan:
    pairs = len(opened.train)
    micro = effective = min(settings.effective_batch_size, pairs)
    if settings.declared_scenario.trains:
        most, beside = -(-effective // processes.world_size), processes.local_world_size
        found = on_rank_zero(
            processes,
            lambda: micro_batch(
                settings, opened.loaded, most, note, beside, to_shard(settings, processes)
            ),
        )
        micro = even_micro_batch(effective, found, processes.world_size)
    return EpochPlan(pairs, effective, micro, settings.seed)


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


def _open_training(settings: Settings, source: "ShardSource | None") -> Pairs:
    folder = settings.data_dir / "train"
    if settings.stream:
        from clipft.data.shards.stream import open_stream  # webdataset takes its time to import

        return open_stream(source or folder, settings.shuffle_buffer, settings.max_train_pairs)
    return open_pairs(folder, settings.max_train_pairs)
