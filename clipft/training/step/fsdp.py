"""Shards weights, gradients and optimizer states over all processes (PyTorch's FSDP2).

Each encoder layer is fetched from all processes before it runs and freed afterwards, so all
processes must run a tower at the same time and equally often. A process with fewer chunks than
another adds blank chunks, whose gradient is zero, and all processes keep the same number of graphs.
Gradients are summed shard by shard after each chunk.

Temperature and bias are not sharded, because the loss reads them outside the towers. The optimizer
works on plain tensors: the shards of its process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from clipft.core.errors import UsageError
from clipft.core.memory import give_back
from clipft.data.batch import EMPTY_BATCH, Batch
from clipft.distributed.collectives import Processes, lost_process_errors
from clipft.distributed.step_channel import StepChannel
from clipft.embedding.load import LoadedModel
from clipft.embedding.towers import Chunk, Chunks, Tower, Towers
from clipft.models.device import Precision
from clipft.models.fast_encoder import ENCODE, encoder_layer
from clipft.models.trainable import TrainableModel
from clipft.training.step.oom import sharded_pass
from clipft.training.step.weights import WHOLE_WEIGHTS, Weights

T = TypeVar("T")


def check_sharding(settings: Settings) -> None:
    """Refuse settings with which weights cannot be sharded.

    Raises:
        UsageError: the scenario is not ``full``, or the 8-bit optimizer is used.
    """
    if not settings.shard_weights:
        return
    if not settings.declared_scenario.full:
        raise UsageError(
            f"--shard-weights needs scenario full: the weights that {settings.scenario} trains "
            "are too few to shard",
            "run without --shard-weights, or use --scenario full",
        )
    if settings.optimizer == "adamw8bit":
        raise UsageError(
            "--shard-weights cannot be combined with --optimizer adamw8bit, whose states are "
            "packed in blocks that do not match the parts of a weight",
            "use --optimizer adamw",
        )


def will_shard(settings: Settings, processes: Processes) -> bool:
    """Return whether the settings ask for sharded weights and there are several processes."""
    return settings.shard_weights and processes.world_size > 1


def hold_weights(
    settings: Settings, loaded: LoadedModel, processes: Processes, note: Callable[[str], None]
) -> Weights:
    """Shard the model's weights, in place, if ``will_shard``; otherwise leave them whole.

    Raises:
        UsageError: the layers of one of the towers are not known.
    """
    if will_shard(settings, processes):
        if why := loaded.base.architecture.unshardable:
            raise UsageError(
                f"--shard-weights: the layers of {loaded.base.name} cannot be sharded, because "
                f"{why}",
                "run without --shard-weights",
            )
        return ShardedWeights(loaded, processes)
    if settings.shard_weights:
        note("note: --shard-weights has no effect in a run of one process.")
    return WHOLE_WEIGHTS


class ShardedWeights(Weights):
    """Parts of each weight, split along its first dimension, one on each process."""

    sharded = True

    def __init__(self, loaded: LoadedModel, processes: Processes) -> None:
        self._processes, device = processes, loaded.precision.device
        everyone = cast(dist.ProcessGroup, dist.group.WORLD)
        self._mesh = DeviceMesh.from_group(everyone, device.type)
        _shard_model(loaded.model, self._mesh)
        give_back(device)  # the memory of the whole weights
        self._parts: dict[nn.Parameter, nn.Parameter] = {
            p: nn.Parameter(cast(DTensor, p.detach()).to_local())
            for _, p in loaded.model.trainable()
            if isinstance(p, DTensor)
        }
        self._wholes = {part: whole for whole, part in self._parts.items()}
        # One row for each tower, of which the blank chunks consist
        inputs = loaded.base.inputs
        end = int(inputs.tokenizer.eos_token_id)
        self._blank_image = inputs.blank_images(1)
        self._blank_text = torch.full((1, 2), end)

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._parts.get(parameter, parameter)

    def fewest(self, count: int) -> int:
        return min(self._processes.gather_objects(count))

    def even_out(self, micro_batches: list[Batch]) -> list[Batch]:
        most = max(self._processes.gather_objects(len(micro_batches)))
        return micro_batches + [EMPTY_BATCH] * (most - len(micro_batches))

    def wrap_towers(self, towers: Towers) -> Towers:
        def together(tower: Tower, blank: Tensor) -> Tower:
            def cut(micro_batches: Sequence[Batch]) -> Chunks:
                own = tower.make_chunks(micro_batches)
                most = max(self._processes.gather_objects(len(own.chunks)))
                filler = Chunk(blank, np.zeros(1, np.uint64), rows=0, cells=blank[0].numel())
                return Chunks([*own.chunks, *[filler] * (most - len(own.chunks))], own.order)

            return replace(
                tower, make_chunks=cut, encode_inputs=partial(_encode, tower.encode_inputs)
            )

        images = together(towers.images, self._blank_image)
        return Towers(images, together(towers.texts, self._blank_text))

    def sum_gradients(
        self,
        model: TrainableModel,
        channel: StepChannel,
        complete: Sequence[nn.Parameter] = (),
        figures: Sequence[float] = (),
    ) -> list[float]:
        whole = [p for _, p in model.trainable() if p not in self._parts]
        sums = channel.sum(whole, complete, figures)
        for parameter, part in self._parts.items():
            gradient, parameter.grad = cast(DTensor | None, parameter.grad), None
            part.grad = None if gradient is None else gradient.to_local()
        return sums

    def clip(self, owned: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        def square(parameters: Iterable[nn.Parameter]) -> Tensor:
            gradients = [p.grad for p in parameters if p.grad is not None]
            return nn.utils.get_total_norm(gradients).double().to(self._mesh.device_type) ** 2

        parts = square(p for p in owned if p in self._wholes)
        with lost_process_errors():
            dist.all_reduce(parts)
        norm = torch.sqrt(parts + square(p for p in owned if p not in self._wholes)).float()
        if math.isfinite(max_norm):
            nn.utils.clip_grads_with_norm_(owned, max_norm, norm)
        return norm

    def make_scaler(self, precision: Precision) -> "torch.amp.GradScaler":
        if precision.name != "fp16":
            return precision.make_scaler()
        # If a gradient overflows in one shard, all processes must skip the step
        return ShardedGradScaler(precision.device.type)

    def model_state(self, model: TrainableModel) -> dict[str, Tensor]:
        return {name: self._gather(self.own(p), p) for name, p in model.trainable()}

    def load_model_state(self, model: TrainableModel, state: dict[str, Tensor]) -> None:
        model.check_state(state)
        with torch.no_grad():
            for name, parameter in model.trainable():
                self.own(parameter).copy_(self._part(state[name], parameter))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self._change_state(optimizer, optimizer.state_dict(), self._gather)

    def own_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        return self._change_state(optimizer, state, self._part)

    def _change_state(
        self,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        change: Callable[[Tensor, nn.Parameter], Tensor],
    ) -> dict[str, Any]:
        """Apply ``change`` to tensors with the shape of a sharded weight, not to step counts."""
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        wholes = {i: self._wholes[p] for i, p in enumerate(owned) if p in self._wholes}
        changed = {
            i: {
                key: change(value, wholes[i]) if isinstance(value, Tensor) and value.ndim else value
                for key, value in values.items()
            }
            if i in wholes
            else values
            for i, values in state["state"].items()
        }
        return {**state, "state": changed}

    def gather_if_sharded(self, make: Callable[[], T]) -> Callable[[], T]:
        made = make()
        return lambda: made

    def _gather(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        """Gather the shards of all processes on rank zero's CPU.

        Other ranks get a tensor of the same shape without memory. ``part`` is sharded in the same
        way as ``parameter``, which may also be whole.
        """
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
        """Return this process's shard of ``whole``, which may be empty."""
        if not isinstance(parameter, DTensor):
            return whole
        parts = torch.chunk(whole, self._processes.world_size)
        rank = self._processes.rank
        return parts[rank] if rank < len(parts) else whole[:0]


def _shard_model(model: TrainableModel, mesh: DeviceMesh) -> None:
    """Shard each layer and both embeddings separately, then the remaining weights."""

    def shard(module: nn.Module, whole: set[nn.Parameter]) -> None:
        sharded: FSDPModule = fully_shard(
            module, mesh=mesh, reshard_after_forward=True, ignored_params=whole
        )
        # The loss already covers all pairs, so gradients are summed and not averaged. Gloo does not
        # support a sum with a factor
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    for tower in (model.clip.vision_model, model.clip.text_model):
        for module in (tower.embeddings, *tower.encoder.layers):
            shard(module, set())
        for layer in tower.encoder.layers:
            # Hooks fetch the weights only in methods that FSDP knows
            setattr(layer, ENCODE, MethodType(encoder_layer, layer))
            register_fsdp_forward_method(layer, ENCODE)
    scalars = (model.logit_scale, model.logit_bias)
    shard(model, {cast(nn.Parameter, value) for value in scalars if value is not None})
    for method in ("encode_images", "encode_texts"):
        register_fsdp_forward_method(model, method)


def _encode(encode_inputs: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with ExitStack() as held:
        held.enter_context(sharded_pass())
        # Each weight is cast only once in a pass, and a cached cast would keep a whole weight
        held.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if torch.is_inference_mode_enabled():
            # Training later uses the weights fetched here, so they must not be inference tensors
            held.enter_context(torch.inference_mode(False))
            held.enter_context(torch.no_grad())
        return encode_inputs(inputs)
