"""Prepares a run: opens its data, loads the model, and decides how to train it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from clipft.config.settings import Settings
from clipft.core.common import Note, Progress, counted, silent
from clipft.core.errors import UsageError
from clipft.data.captions.metadata import check_chosen_fields, check_label_options
from clipft.data.captions.table import NoCaptions
from clipft.data.captions.template import CaptionTemplate
from clipft.data.decoding import Preprocessing
from clipft.data.few_shot import label_remarks, training_pairs
from clipft.data.loader import Pairs
from clipft.data.order import EpochPlan
from clipft.data.positives import make_positives, product_ids
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.folders import general_pairs, open_pairs
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import (
    on_all_ranks,
    on_rank_zero,
    rank_zero_first,
)
from clipft.embedding.encoding import (
    Encoding,
    data_remarks,
    open_encoding,
    training_preprocessing,
    validation_preprocessing,
)
from clipft.embedding.feature_cache import CacheForecast
from clipft.embedding.load import LoadedModel, load_model
from clipft.embedding.look_alikes import LookAlikeSearch, look_alikes
from clipft.embedding.towers import choose_shapes
from clipft.evaluation.request import general_settings
from clipft.models.pretrained import load_inputs
from clipft.runs.records import NEW_RUN, Choices
from clipft.training.plan import even_micro_batch, lay_plan, micro_batch, step_remarks
from clipft.training.setup import RunSetup, validation_batch
from clipft.training.step.fsdp import check_sharding, hold_weights, will_shard
from clipft.training.step.general_set import Held, open_held
from clipft.training.step.losses import make_loss
from clipft.training.step.optimizer import (
    choose_optimizer,
)
from clipft.training.step.weights import Weights

if TYPE_CHECKING:
    from clipft.data.shards.stream import ShardSource


def prepare(
    settings: Settings,
    note: Note,
    processes: Processes,
    progress: Progress = silent,
    source: "ShardSource | None" = None,
    began: Choices = NEW_RUN,
    cache: CacheForecast | None = None,
) -> RunSetup:
    """Open the data, load the model, choose the micro-batch and make the plan.

    ``began`` holds the choices that a resumed run made at its start. With ``cache``, for a
    forecast, the features of frozen towers are not computed, and ``cache`` receives estimates.

    Every process gets the same setup. One process of each machine fills the cache folder first, and
    the others then read from it.

    Raises:
        DataError: pairs are missing or cannot be used.
        ModelError: the base model cannot be loaded, or does not fit the scenario.
        UsageError: settings do not fit together or do not fit the data.
    """
    check_sharding(settings)
    check_label_options(settings)
    data = rank_zero_first(processes, lambda: _open_data(settings, note, processes, source))
    train, val = data.train, data.val
    loaded = _load_everywhere(settings, train, processes, began.precision, note)
    here = settings.model_copy(update={"precision": loaded.precision.name})
    products = product_ids(settings, train, note)
    epoch_plan = _plan_epochs(settings, loaded, train, processes, began, note)
    if products is not None:
        assert isinstance(train, PairDataset)  # a stream has no products
        search = partial(look_alikes, settings, train, products, progress, cache)
        find = partial(on_rank_zero, processes, search)
        epoch_plan = _with_products(epoch_plan, products, settings, began.look_alikes, find)
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
        found = open_encoding(model, pairs, preprocessing, settings, note, shapes, progress, cache)
        # The pretrained model is not sharded
        towers = weights.wrap_towers(found.towers) if model is loaded else found.towers
        return replace(found, towers=towers)

    def open_search(at_once: int) -> LookAlikeSearch | None:
        if products is None or settings.hard_negatives_by != "current":
            return None
        assert isinstance(train, PairDataset)
        plain = replace(data.preprocessing, captions=NoCaptions(), augmentation="none")
        how = opened(loaded, train, plain, at_once, at_once)
        return LookAlikeSearch(loaded, train, how, products, settings, at_once)

    def open_all() -> tuple[Encoding, Encoding, Held, LookAlikeSearch | None]:
        at_once = validation_batch(settings, loaded, epoch_plan.micro)
        return (
            opened(loaded, train, data.preprocessing),
            opened(loaded, val, data.val_preprocessing, at_once, at_once),
            open_held(here, loaded, (train, data.preprocessing), data.general, epoch_plan, opened),
            open_search(at_once),
        )

    encoding, val_encoding, held, searched = rank_zero_first(processes, open_all)
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
        look_alike_search=searched,
    )


def _plan_epochs(
    settings: Settings,
    loaded: LoadedModel,
    train: Pairs,
    processes: Processes,
    began: Choices,
    note: Note,
) -> EpochPlan:
    """Choose the micro-batch and divide an epoch into steps, in the same way on all processes."""
    micro = effective = min(settings.effective_batch_size, len(train))
    if settings.declared_scenario.trains:
        most, beside = -(-effective // processes.world_size), processes.local_world_size
        sharding = will_shard(settings, processes)
        found = on_rank_zero(  # measured on one process, because others would take memory
            processes, lambda: micro_batch(settings, loaded, most, note, beside, sharding)
        )
        micro = even_micro_batch(effective, found, processes.world_size)
    return EpochPlan(len(train), effective, micro, settings.seed, began.smallest_step)


def _with_products(
    plan: EpochPlan,
    products: Tensor,
    settings: Settings,
    found: Tensor | None,
    find: Callable[[], Tensor],
) -> EpochPlan:
    """Add products, and look-alikes by the pretrained model, which were ``found`` at the start of
    the run or are found now."""
    if settings.hard_negatives and settings.hard_negatives_by == "pretrained" and found is None:
        found = find()
    return replace(
        plan,
        products=products.numpy() if settings.photo_pairs else None,
        look_alikes=None if found is None else found.numpy(),
        hard_negatives=settings.hard_negatives,
    )


def _agreed_optimizer(
    settings: Settings,
    loaded: LoadedModel,
    processes: Processes,
    weights: Weights,
    began: Choices,
    note: Note,
) -> str:
    """Return the optimizer for all processes: AdamW unless all of them can use the 8-bit one."""
    if not settings.declared_scenario.trains:
        return "adamw"
    trainable, device = loaded.model.parameters_count().trainable, loaded.precision.device

    def choose() -> str:
        return choose_optimizer(settings, device, trainable, weights.sharded, began.optimizer, note)

    chosen = processes.gather_objects(on_all_ranks(processes, choose))
    return chosen[0] if len(set(chosen)) == 1 else "adamw"


@dataclass(frozen=True)
class _Data:
    """The pairs of a run and their captions. ``general`` holds those of ``--preserve-data``.
    ``remarks`` are made only by rank zero."""

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
        from clipft.data.shards.stream import open_stream  # webdataset is slow to import

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
                f"validation uses {settings.evaluation_queries:,} of {counted(len(val), 'pair')} "
                "as queries; --evaluation-queries 0 uses all"
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
    settings: Settings, train: Pairs, processes: Processes, began: str, note: Note
) -> LoadedModel:
    """Load the model on all processes; a resumed run keeps the precision in ``began``.

    Raises:
        ModelError: the base model cannot be loaded, or does not fit the scenario.
        UsageError: the processes have different models or pairs.
    """
    loaded = on_all_ranks(processes, lambda: load_model(settings, began=began, note=note))
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
                f"process {rank} has a different {differing[0]} than process {processes.rank}",
                "give all machines the same model folder and the same shards",
            )
