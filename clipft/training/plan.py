"""What a run will do, decided before it starts: its micro-batch, its steps, what to say first."""

from collections.abc import Callable, Sequence

import torch

from clipft.config.settings import FALLBACK_MICRO_BATCH, Settings
from clipft.core.common import Note, counted
from clipft.core.memory import memory_in_use, usable_memory
from clipft.data.order import EpochPlan
from clipft.embedding.load import LoadedModel
from clipft.runs.records import Plan
from clipft.training.batch_size import Found, FoundCache, Probe
from clipft.training.probe import find, probe_of
from clipft.training.step.gradcache import ACCUMULATIONS
from clipft.training.step.optimizer import choose_optimizer, warmup_steps

_FEW_STEPS = 50
_ENOUGH_STEPS = 200
_EASY = 0.8
"""Of the free memory of a CPU, for a micro-batch: a run holds more than a step."""


def lay_plan(
    settings: Settings,
    loaded: LoadedModel,
    steps: EpochPlan,
    val_pairs: int,
    processes: int,
    notes: Sequence[str],
    sharded: bool = False,
) -> Plan:
    """The plan of a run whose epochs go by ``steps``."""
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
        optimizer=choose_optimizer(
            settings, loaded.precision.device, parameters.trainable, sharded
        ),
        notes=tuple(notes),
        processes=processes,
    )


def find_micro_batch(
    settings: Settings,
    loaded: LoadedModel,
    effective: int,
    report: Callable[[Probe], None],
    processes: int = 1,
    note: Note = lambda said: None,
) -> Found:
    """Search the micro-batch for an effective batch, or take what was found before;
    ``processes`` share the machine. ``note`` is told that a search begins."""
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
        note(
            "Finding the micro-batch size (done once for each model, scenario, effective batch and "
            "machine) ..."
        )
        found = find(probe_of(loaded, settings), effective, report, processes)
        cache.put(key, found)
    return found


def even_micro_batch(effective: int, micro: int, processes: int) -> int:
    """The largest micro-batch up to ``micro`` of which each process has equally many."""
    if processes == 1:
        return micro
    share = -(-effective // processes)
    return -(-share // -(-share // micro))


def micro_batch(
    settings: Settings,
    loaded: LoadedModel,
    effective: int,
    note: Note,
    processes: int,
    to_shard: bool = False,
) -> int:
    """The one that was set, as far as memory goes, or the fastest that is found; ``processes``
    share the machine. ``to_shard``: the model is still whole, and no measure of what it takes."""
    if settings.micro_batch_size:
        asked = min(settings.micro_batch_size, effective)
        return _within_memory(asked, settings, loaded, note, processes)
    if to_shard:
        note("note: with --shard-weights --micro-batch-size is not found, but to be set.")
        return min(FALLBACK_MICRO_BATCH, effective)
    if loaded.precision.device.type == "mps":  # its memory cannot be measured
        return min(FALLBACK_MICRO_BATCH, effective)
    found = find_micro_batch(settings, loaded, effective, lambda probe: None, processes, note)
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
    cutting = ACCUMULATIONS[settings.accumulation].cutting
    fitting = max(cutting.least, int(free / each))
    note(
        f"warning: micro-batches of {asked} would take about {asked * each / 2**30:.1f} GiB of "
        f"the {free / 2**30:.1f} that are free: taking {fitting}; "
        f"{cutting.consequence}."
    )
    return fitting


def step_remarks(settings: Settings, plan: EpochPlan) -> list[str]:
    """What a user should know of the steps before the run."""
    remarks = []
    if settings.effective_batch_size > plan.pairs:
        remarks.append(
            f"effective batch {settings.effective_batch_size} is more than the {plan.pairs} "
            f"training pairs: each step takes them all"
        )
    steps = plan.steps * settings.epochs
    if steps < _FEW_STEPS and not settings.mini_train:
        remarks.append(
            f"only {counted(steps, 'optimizer step')} in the whole run, too few to learn much: "
            f"{smaller_batch(plan, settings.epochs)}more --epochs give more"
        )
    first, last = plan.bounds[-1]
    if last - first != plan.effective:
        remarks.append(f"the last step of each epoch takes {counted(last - first, 'pair')}")
    return remarks


def smaller_batch(plan: EpochPlan, epochs: int) -> str:
    """The power of two that makes about ``_ENOUGH_STEPS`` steps, where it is smaller."""
    wanted = max(8, plan.pairs * epochs // _ENOUGH_STEPS)
    power = 1 << (wanted.bit_length() - 1)
    return f"--effective-batch-size {power} or " if power < plan.effective else ""
