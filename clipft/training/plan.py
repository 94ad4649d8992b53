"""The plan of a run, made before it starts: its micro-batch, steps and remarks for the user."""

from collections.abc import Callable, Sequence

import torch

from clipft.config.sections.training import FALLBACK_MICRO_BATCH
from clipft.config.settings import Settings
from clipft.core.common import Note, counted
from clipft.core.memory import MemoryBudget, usable_memory
from clipft.data.order import EpochPlan
from clipft.embedding.load import LoadedModel
from clipft.runs.records import Plan
from clipft.training.defaults import ENOUGH_STEPS, SMALLEST_BATCH
from clipft.training.finder.batch_size import Probe, SearchResult, cached_result, keep_result
from clipft.training.finder.probe import ModelProbe, measure
from clipft.training.step.gradcache import ACCUMULATIONS
from clipft.training.step.optimizer import warmup_steps

_FEW_STEPS = 50
_LESS_MEMORY = 0.9


def lay_plan(
    settings: Settings,
    loaded: LoadedModel,
    steps: EpochPlan,
    val_pairs: int,
    processes: int,
    notes: Sequence[str],
    optimizer: str,
) -> Plan:
    """The plan of a run whose epochs are divided into ``steps``."""
    parameters = loaded.model.parameters_count()
    epochs = settings.epochs if settings.declared_scenario.trains else 0
    return Plan(
        scenario=settings.scenario,
        model=settings.model,
        parameters=str(parameters),
        trainable_parameters=parameters.trainable,
        train_pairs=steps.pairs,
        val_pairs=val_pairs,
        epochs=epochs,
        steps_per_epoch=steps.steps,
        warmup_steps=warmup_steps(settings.warmup_steps, epochs * steps.steps),
        effective_batch_size=steps.effective,
        micro_batch_size=steps.micro,
        device=str(loaded.precision.device),
        precision=loaded.precision.name,
        optimizer=optimizer,
        notes=tuple(notes),
        processes=processes,
    )


def micro_batch(
    settings: Settings,
    loaded: LoadedModel,
    effective: int,
    note: Note,
    processes: int,
    sharding: bool = False,
) -> int:
    """Return the micro-batch of the settings, limited by memory, or the fastest one found.

    ``processes`` processes share the machine. With ``sharding`` the model is not sharded yet at
    this point, so its memory cannot be measured.
    """
    device = loaded.precision.device
    if settings.micro_batch_size:
        asked = min(settings.micro_batch_size, effective)
        if device.type != "cpu":
            return asked  # if a GPU runs out of memory, step/oom.py handles it
        # On a CPU the system would kill the process instead
        budget = MemoryBudget.now(device, sharers=processes)
        per_pair = ModelProbe.of(loaded, settings).graph_bytes_per_pair
        largest = budget.largest_micro_batch(per_pair)
        if asked <= largest:
            return asked
        kind = ACCUMULATIONS[settings.accumulation]
        fitting, each = max(kind.smallest_micro_batch, largest), per_pair * budget.over_graph
        note(
            f"warning: micro-batches of {asked} would take about {asked * each / 2**30:.1f} GiB, "
            f"but a step may take only {budget.free / 2**30:.1f} GiB: using {fitting}; "
            f"{kind.if_smaller}."
        )
        return fitting
    if sharding:
        note(
            "note: clipft does not search for a micro-batch size with --shard-weights and uses "
            f"{min(FALLBACK_MICRO_BATCH, effective)}. Set another one with --micro-batch-size."
        )
        return min(FALLBACK_MICRO_BATCH, effective)
    if device.type == "mps":  # its memory cannot be measured
        return min(FALLBACK_MICRO_BATCH, effective)
    return find_micro_batch(settings, loaded, effective, lambda probe: None, processes, note).chosen


def find_micro_batch(
    settings: Settings,
    loaded: LoadedModel,
    effective: int,
    report: Callable[[Probe], None],
    processes: int = 1,
    note: Note = lambda said: None,
) -> SearchResult:
    """Search for the micro-batch of an effective batch, or return an earlier result.

    ``processes`` processes share the machine. ``note`` is called when a search begins, and
    ``report`` for each size that is tried.
    """
    device = loaded.precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    decisive = (
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
    )
    key = "|".join(map(str, decisive))
    found = cached_result(key)
    # A result that was found with much more free memory may not fit now
    if found is None or found.usable_bytes * _LESS_MEMORY > usable_memory(device, processes):
        note(
            "Finding the micro-batch size (once for each model, scenario, effective batch and "
            "machine) ..."
        )
        found = measure(ModelProbe.of(loaded, settings), effective, report, processes)
        keep_result(key, found)
    return found


def even_micro_batch(effective: int, micro: int, processes: int) -> int:
    """Return a size up to ``micro`` that gives all processes the same number of micro-batches."""
    if processes == 1:
        return micro
    share = -(-effective // processes)
    return -(-share // -(-share // micro))


def step_remarks(settings: Settings, plan: EpochPlan) -> list[str]:
    """Return remarks for the user about the steps of the run."""
    remarks = []
    if settings.effective_batch_size > plan.pairs:
        remarks.append(
            f"the effective batch of {settings.effective_batch_size} is larger than the "
            f"{plan.pairs} training pairs: each step uses all of them"
        )
    steps = plan.steps * settings.epochs
    if steps < _FEW_STEPS and not settings.mini_train:
        remarks.append(
            f"only {counted(steps, 'optimizer step')} in the whole run, too few to learn much: "
            f"use {smaller_batch(plan, settings.epochs)}more --epochs"
        )
    first, last = plan.bounds[-1]
    if last - first != plan.effective:
        remarks.append(f"the last step of each epoch has {counted(last - first, 'pair')}")
    return remarks


def smaller_batch(plan: EpochPlan, epochs: int) -> str:
    """Return the option for an effective batch, a power of two, that gives about ``ENOUGH_STEPS``
    steps; empty if it would not be smaller than the current one."""
    wanted = max(SMALLEST_BATCH, plan.pairs * epochs // ENOUGH_STEPS)
    power = 1 << (wanted.bit_length() - 1)
    return f"--effective-batch-size {power} or " if power < plan.effective else ""
