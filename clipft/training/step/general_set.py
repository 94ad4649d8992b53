"""The pairs of ``--preserve-data``: which of them each step uses, and how both models encode them.

A step uses as many of these pairs as it trains on, or all if there are fewer. Their order depends
on the seed and the number of steps done, as for training pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from clipft.config.settings import Settings
from clipft.data.batch import StepBatch
from clipft.data.decoding import Preprocessing
from clipft.data.loader import LoaderOptions, Pairs, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.dataset import PairDataset
from clipft.embedding.encoding import Encoding
from clipft.embedding.load import LoadedModel, load_model
from clipft.training.step.preservation import (
    NOTHING_PRESERVED,
    HeldGeneralSet,
    HeldPairs,
    Preservation,
)

Open = Callable[[LoadedModel, Pairs, Preprocessing], Encoding]
"""Opens the encoding of a model for some pairs."""


@dataclass(frozen=True)
class GeneralSet:
    """Pairs whose embeddings a run preserves, and how they are divided into steps."""

    pairs: PairDataset
    preprocessing: Preprocessing
    plan: EpochPlan

    def beside(
        self, batches: Iterator[StepBatch], done: int, total: int, options: LoaderOptions
    ) -> Iterator[StepBatch]:
        """Add general pairs to the batch of each step after ``done`` of ``total`` steps."""
        start = Position(*divmod(done, self.plan.steps))
        rounds = -(-total // self.plan.steps)
        # Two loaders share the processors
        options = replace(options, workers=-(-options.workers // 2))
        general = training_batches(
            self.pairs, self.preprocessing, self.plan, start, rounds, options
        )
        for batch, further in zip(batches, general, strict=False):
            yield replace(batch, general=further.micro_batches)


@dataclass(frozen=True)
class Held:
    """The penalty by which a run preserves embeddings, and the general set if there is one."""

    preservation: Preservation = NOTHING_PRESERVED
    general: GeneralSet | None = None

    @property
    def identity(self) -> str:
        """A text that is equal for equal general sets; "" if there is none."""
        return self.general.pairs.identity() if self.general else ""


NOTHING_HELD = Held()


def open_held(
    settings: Settings,
    loaded: LoadedModel,
    train: tuple[Pairs, Preprocessing],
    general: tuple[PairDataset, Preprocessing] | None,
    plan: EpochPlan,
    open_encoding: Open,
) -> Held:
    """Load the pretrained model, and open the pairs that ``--preserve`` needs.

    Args:
        settings: the settings of the run, with the precision that was chosen.
        loaded: the model that is trained.
        train: the training pairs, and how they are prepared.
        general: the pairs of ``--preserve-data``, and how they are prepared.
        plan: how the training pairs are divided into steps.
        open_encoding: opens the encoding of a model for some pairs.
    """
    if not settings.preserve or not settings.declared_scenario.trains:
        return NOTHING_HELD
    pretrained = _pretrained(settings)
    if general is None:
        return Held(HeldPairs(settings.preserve, open_encoding(pretrained, *train).towers))
    pairs, trained = general[0], open_encoding(loaded, *general)
    at_once = min(plan.effective, len(pairs))
    steps = EpochPlan(len(pairs), at_once, min(plan.micro, at_once), settings.seed)
    towers = open_encoding(pretrained, *general).towers
    held = HeldGeneralSet(settings.preserve, towers, trained.towers, at_once)
    return Held(held, GeneralSet(pairs, trained.preprocessing, steps))


def _pretrained(settings: Settings) -> LoadedModel:
    """Load the pretrained model with the input sizes of the run."""
    plain = {"scenario": "zero_shot", "loss": "auto", "gradient_checkpointing": False}
    loaded = load_model(settings.model_copy(update=plain))
    loaded.model.eval()
    return loaded
