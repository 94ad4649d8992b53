"""Weights, gradients and optimizer states in parts, one on each process (PyTorch's FSDP2).

Each encoder layer is fetched from all processes before it works and dropped after, so a pass
through a tower is a meeting of all. They must therefore pass equally often: what a process lacks
in chunks it makes up for with blank ones, whose gradient is zero, and a graph is kept only where
all keep theirs. Gradients are summed part by part after each chunk.

The temperature and the bias, which the loss reads outside any tower, stay whole. The optimizer
works on plain tensors, each process's own parts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from clipft.config.settings import Settings
from clipft.core.errors import MemoryShortage, UsageError
from clipft.core.memory import give_back
from clipft.data.loader import EMPTY_BATCH, Batch
from clipft.distributed.collectives import Processes, lost_process_error, lost_process_errors
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Chunk, Chunking, Chunks, Tower, Towers
from clipft.models.device import Precision
from clipft.models.fast_encoder import POOLED, pooled_layer
from clipft.models.trainable import TrainableModel
from clipft.training.step.gradcache import Accumulation
from clipft.training.step.oom import memory_ran_out
from clipft.training.step.weights import WHOLE, Weights

T = TypeVar("T")


def check_sharding(settings: Settings) -> None:
    """
    Raises:
        UsageError: weights cannot be sharded under these settings.
    """
    if not settings.shard_weights:
        return
    if not settings.declared_scenario.full:
        raise UsageError(
            f"--shard-weights is for scenario full: what {settings.scenario} trains is small",
            "leave --shard-weights out, or use --scenario full",
        )
    if settings.optimizer == "adamw8bit":
        raise UsageError(
            "--shard-weights does not go with --optimizer adamw8bit, whose states are packed in "
            "blocks that parts of a weight would cut",
            "use --optimizer adamw",
        )


def to_shard(settings: Settings, processes: Processes) -> bool:
    return settings.shard_weights and processes.world_size > 1


def hold_weights(
    settings: Settings, loaded: LoadedModel, processes: Processes, note: Callable[[str], None]
) -> Weights:
    """Shard the model's weights in place, if the settings ask for it and there are others."""
    if to_shard(settings, processes):
        return ShardedWeights(loaded, processes)
    if settings.shard_weights:
        note("note: --shard-weights does nothing in a run of one process.")
    return WHOLE


class ShardedWeights:
    """Parts of each weight, cut along its first dimension, one on each process."""

    sharded = True

    def __init__(self, loaded: LoadedModel, processes: Processes) -> None:
        self._processes, device = processes, loaded.precision.device
        everyone = cast(dist.ProcessGroup, dist.group.WORLD)
        self._mesh = DeviceMesh.from_group(everyone, device.type)
        _shard(loaded.model, self._mesh)
        give_back(device)  # the whole weights
        self._blanks = _Blanks.of(loaded)
        self._parts: dict[nn.Parameter, nn.Parameter] = {
            p: nn.Parameter(cast(DTensor, p.detach()).to_local())
            for _, p in loaded.model.trainable()
            if isinstance(p, DTensor)
        }
        self._wholes = {part: whole for whole, part in self._parts.items()}

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._parts.get(parameter, parameter)

    def agreed(self, flag: bool) -> bool:
        return not self._processes.any(not flag)

    def towers(self, towers: Towers) -> Towers:
        return Towers(
            self._together(towers.images, self._blanks.picture),
            self._together(towers.texts, self._blanks.text),
            self._even_out,
        )

    def _together(self, tower: Tower, blank: Tensor) -> Tower:
        cut = _AsManyOnAll(tower.cut, blank, self._processes)
        return replace(tower, cut=cut, encode_inputs=partial(_encode, tower.encode_inputs))

    def _even_out(self, micro_batches: list[Batch]) -> list[Batch]:
        most = max(self._processes.gather_objects(len(micro_batches)))
        return micro_batches + [EMPTY_BATCH] * (most - len(micro_batches))

    def sum_gradients(
        self, model: TrainableModel, processes: Processes, complete: Sequence[nn.Parameter]
    ) -> None:
        whole = [p for _, p in model.trainable() if p not in self._parts]
        processes.sum_gradients(whole, complete)
        for parameter, part in self._parts.items():
            gradient, parameter.grad = cast(DTensor | None, parameter.grad), None
            part.grad = None if gradient is None else gradient.to_local()

    def clip(self, owned: Sequence[nn.Parameter], most: float) -> float:
        def square(parameters: Iterable[nn.Parameter]) -> Tensor:
            gradients = [p.grad for p in parameters if p.grad is not None]
            return nn.utils.get_total_norm(gradients).double().to(self._mesh.device_type) ** 2

        parts = square(p for p in owned if p in self._wholes)
        with lost_process_errors():
            dist.all_reduce(parts)
        norm = torch.sqrt(parts + square(p for p in owned if p not in self._wholes)).float()
        if math.isfinite(most):
            nn.utils.clip_grads_with_norm_(owned, most, norm)
        return float(norm)

    def make_scaler(self, precision: Precision) -> "torch.amp.GradScaler":
        if precision.name != "fp16":
            return precision.make_scaler()
        return ShardedGradScaler(precision.device.type)  # what one cannot use, all skip

    def model_state(self, model: TrainableModel) -> dict[str, Tensor]:
        return {name: self._gather(self.own(p), p) for name, p in model.trainable()}

    def load_model_state(self, model: TrainableModel, state: dict[str, Tensor]) -> None:
        model.check_state(state)
        with torch.no_grad():
            for name, parameter in model.trainable():
                self.own(parameter).copy_(self._part(state[name], parameter))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        def whole(value: Any, parameter: nn.Parameter) -> Any:
            return self._gather(value, parameter) if _shaped(value) else value

        return self._each_state(optimizer, optimizer.state_dict(), whole)

    def own_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        def part(value: Any, parameter: nn.Parameter) -> Any:
            return self._part(value, parameter) if _shaped(value) else value

        return self._each_state(optimizer, state, part)

    def _each_state(
        self,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        change: Callable[[Any, nn.Parameter], Any],
    ) -> dict[str, Any]:
        """``state`` with each value of each sharded parameter changed."""
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        wholes = {i: self._wholes[p] for i, p in enumerate(owned) if p in self._wholes}
        changed = {
            i: {k: change(v, wholes[i]) for k, v in values.items()} if i in wholes else values
            for i, values in state["state"].items()
        }
        return {**state, "state": changed}

    def now(self, make: Callable[[], T]) -> Callable[[], T]:
        made = make()
        return lambda: made

    def _gather(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        """The whole of which each process has ``part``, on the first one's CPU; its shape alone
        on the others. ``parameter``: cut in the same way, or not at all."""
        whole = part.detach()
        if isinstance(parameter, DTensor):
            with lost_process_errors():
                whole = DTensor.from_local(
                    whole,
                    self._mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                ).full_tensor()
        return whole.cpu().clone() if self._processes.rank == 0 else whole.to("meta")

    def _part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor):
            return whole
        parts = torch.chunk(whole, self._processes.world_size)
        rank = self._processes.rank
        return parts[rank] if rank < len(parts) else whole[:0]


@dataclass(frozen=True)
class Unshrinking:
    """``accumulate`` over sharded weights: a process without memory cannot have the step done
    again in smaller chunks, because the others wait for it within a pass."""

    accumulate: Accumulation

    def __call__(self, step: int, micro_batches: list[Batch]) -> Tensor:
        """
        Raises:
            MemoryShortage: of this process alone.
            ProcessError: another process ended.
        """
        with _passing():
            return self.accumulate(step, micro_batches)

    def floor(self, micro_batches: list[Batch]) -> float:
        return self.accumulate.floor(micro_batches)


def _shard(model: TrainableModel, mesh: DeviceMesh) -> None:
    """Each layer, both embeddings, and what is left."""
    values = (model.logit_scale, model.logit_bias)
    whole = {cast(nn.Parameter, value) for value in values if value is not None}
    towers = (model.clip.vision_model, model.clip.text_model)
    for tower in towers:
        for module in (tower.embeddings, *tower.encoder.layers):
            _fully_shard(module, mesh, set())
        last = tower.encoder.layers[-1]
        setattr(last, POOLED, MethodType(pooled_layer, last))
        register_fsdp_forward_method(last, POOLED)
    _fully_shard(model, mesh, whole)
    for way_in in ("encode_images", "encode_texts"):
        register_fsdp_forward_method(model, way_in)


def _fully_shard(module: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    sharded: FSDPModule = fully_shard(
        module, mesh=mesh, reshard_after_forward=True, ignored_params=whole
    )
    # The loss is that of all pairs: gradients add up. Gloo knows no sum with a factor
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class _Blanks:
    """A row of each tower that stands for nothing."""

    picture: Tensor
    text: Tensor

    @classmethod
    def of(cls, loaded: LoadedModel) -> "_Blanks":
        inputs, device = loaded.base.inputs, loaded.precision.device
        image_size, end = inputs.image_size, int(inputs.tokenizer.eos_token_id)
        picture = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
        return cls(picture, torch.full((1, 2), end, device=device))


@dataclass(frozen=True)
class _AsManyOnAll:
    """``cut``, and blank chunks up to the number of the process that has most."""

    cut: Chunking
    blank: Tensor
    processes: Processes

    def __call__(self, micro_batches: Sequence[Batch]) -> Chunks:
        own = self.cut(micro_batches)
        most = max(self.processes.gather_objects(len(own.chunks)))
        blanks = [
            Chunk(number, self.blank, np.zeros(1, np.uint64), self.blank[0].numel())
            for number in range(len(own.chunks), most)
        ]
        return Chunks([*own.chunks, *blanks], own.order)


def _encode(encode_inputs: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with ExitStack() as held:
        held.enter_context(_passing())
        # Each weight is cast once in a pass: a cast that is kept would be a whole one
        held.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if torch.is_inference_mode_enabled():
            # What is fetched here serves training later, which it could not as inference tensors
            held.enter_context(torch.inference_mode(False))
            held.enter_context(torch.no_grad())
        return encode_inputs(inputs)


@contextmanager
def _passing() -> Iterator[None]:
    """
    Raises:
        MemoryShortage: of this process alone.
        ProcessError: another process ended.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if memory_ran_out(error):
            shortage = MemoryShortage(
                "memory ran out, and with --shard-weights a step cannot be done again in smaller "
                "chunks",
                "`clipft resume` goes on from the last checkpoint: with a smaller "
                "--micro-batch-size, --gradient-checkpointing, --graph-memory 0, or more processes",
            )
            shortage.alone = True
            raise shortage from error
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise lost_process_error(error) from error
        raise


def _shaped(value: Any) -> bool:
    """Of an optimizer's state: shaped as the weight is."""
    return isinstance(value, Tensor) and value.ndim > 0
