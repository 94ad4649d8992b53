"""The parts of a run, made once before its first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import Note
from clipft.core.memory import MemoryBudget
from clipft.data.batch import StepBatch
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, Pairs, one_ahead, training_batches
from clipft.data.order import EpochPlan, Position, Share
from clipft.data.positives import Positives
from clipft.data.shards.dataset import PairDataset
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import (
    steps_in_lockstep,
)
from clipft.distributed.step_channel import open_channel
from clipft.embedding.embed import Embeddings
from clipft.embedding.encoding import (
    Encoding,
    evaluation_batch,
)
from clipft.embedding.load import LoadedModel
from clipft.embedding.look_alikes import LookAlikeSearch
from clipft.embedding.towers import Tower, make_towers
from clipft.runs.records import Choices, Plan
from clipft.training.state import TrainState
from clipft.training.step.average import NO_AVERAGE, MovingAverage, WeightAverage
from clipft.training.step.general_set import NOTHING_HELD, Held
from clipft.training.step.gradcache import ACCUMULATIONS, Accumulation
from clipft.training.step.losses import ContrastiveLoss
from clipft.training.step.oom import EndsRun, Recovery, SmallerPieces
from clipft.training.step.optimizer import (
    Optimizer,
    make_adamw,
    one_cycle,
    parameter_groups,
)
from clipft.training.step.tower_pass import GraphMemory
from clipft.training.step.weights import Weights

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run consists of, except its state.

    ``products`` and ``val_products`` hold the product of each pair, int64 [pairs], if photos of a
    product attract each other. ``look_alike_search`` finds the look-alikes of each epoch, if each
    epoch finds its own.
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
    look_alike_search: LookAlikeSearch | None = None

    @property
    def choices(self) -> Choices:
        """The choices of this run that a resumed run keeps."""
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
        look_alikes: Tensor | None = None,
    ) -> Iterator[StepBatch]:
        """Yield this process's part of each step from ``start`` to the end of the last epoch, or of
        this epoch if its ``look_alikes`` are given.

        ``pairs`` and ``skipped`` of a batch are those of all processes. ``check`` is called before
        each step, and its errors are raised on all processes. ``start_to_copy``: see
        ``loop.step_batches``.
        """
        plan, epochs = self.epoch_plan, self.plan.epochs
        if look_alikes is not None:  # the next epoch has different ones
            plan = replace(plan, look_alikes=look_alikes.numpy())
            epochs = min(epochs, start.epoch + 1)
        batches = training_batches(
            self.train, self.encoding.preprocessing, plan, start, epochs, self.loader_options
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
        """Make the optimizer of this run, before its first step."""
        settings, precision = self.settings, self.loaded.precision
        groups = parameter_groups(self.loaded.model, settings)
        for group in groups:
            group["params"] = [self.weights.own(parameter) for parameter in group["params"]]
        adamw = make_adamw(self.plan.optimizer, groups, precision.device)
        scheduler = one_cycle(adamw, self.plan.total_steps, self.plan.warmup_steps)
        scaler = self.weights.make_scaler(precision)
        return Optimizer(adamw, scheduler, scaler, settings.grad_clip, self.weights)

    def make_state(self) -> TrainState:
        """Make the state of this run before its first step."""
        model = self.loaded.model
        average: WeightAverage = NO_AVERAGE
        if self.settings.ema:
            own = [self.weights.own(parameter) for _, parameter in model.trainable()]
            average = MovingAverage(own, self.settings.ema)
        return TrainState(model, self.make_optimizer(), self.epoch_plan.steps, average)

    def make_accumulation(self, optimizer: Optimizer, note: Note) -> Accumulation:
        """Make the object that computes the gradient of each step and handles a full memory."""

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
        """The text tower itself: ``val_encoding`` may only have the features of captions."""
        pad_token_id = self.val_preprocessing.captions.pad_token_id
        towers = make_towers(self.loaded, self.settings.seed, pad_token_id)
        return self.weights.wrap_towers(towers).texts

    @property
    def validation_batch(self) -> int:
        """The number of validation pairs that pass through the towers together."""
        return validation_batch(self.settings, self.loaded, self.plan.micro_batch_size)

    @torch.no_grad()
    def validation_loss(self, embedded: Embeddings) -> float:
        """Return the training loss over the whole validation set as one batch. If pairs have
        several captions, it is the mean over batches that use each caption in turn."""
        device = self.loaded.precision.device
        images, products = embedded.images.to(device), self._products_of(embedded)
        return fmean(
            float(self.loss(images, one.texts.to(device), one.groups, products))
            for one in embedded.rounds()
        )

    def loss_lower_bound(self, embedded: Embeddings) -> float:
        """Return the smallest value that ``validation_loss`` can have."""
        products = self._products_of(embedded)
        return fmean(self.loss.lower_bound(one.groups, products) for one in embedded.rounds())

    def _products_of(self, embedded: Embeddings) -> Tensor | None:
        return None if self.val_products is None else self.val_products[list(embedded.numbers)]


def validation_batch(settings: Settings, loaded: LoadedModel, micro: int) -> int:
    """Return the number of validation pairs that pass through the towers together.

    On a GPU this is a micro-batch, which is known to fit. On a CPU, larger batches are not faster.
    """
    device = loaded.precision.device
    return micro if device.type == "cuda" else evaluation_batch(settings, device)
