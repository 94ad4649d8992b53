"""Opening and embedding the pairs that are measured."""

from clipft.data.loader import LoaderOptions, Places, evaluation_batches
from clipft.data.order import Share
from clipft.data.shards.dataset import PairDataset, open_pairs
from clipft.core.errors import DataError
from clipft.config.settings import Settings
from clipft.embedding.embed import Embeddings, embed
from clipft.embedding.encoding import Encoding
from clipft.embedding.load import LoadedModel
from clipft.data.positives import EACH_FOR_ITSELF, Positives
from clipft.training.shared_steps import ON_ITS_OWN, Rounds

_BATCH = 64
"""Pairs per forward pass without gradients, where no micro-batch is set."""


def validation_pairs(settings: Settings) -> PairDataset:
    """``{data_dir}/val``, or ``data_dir`` itself where the shards lie directly in it."""
    nested = settings.data_dir / "val"
    flat = not nested.exists() and any(settings.data_dir.glob("*.tar"))
    return open_pairs(settings.data_dir if flat else nested, settings.max_val_pairs)


def embed_pairs(
    loaded: LoadedModel,
    pairs: Places,
    how: Encoding,
    settings: Settings,
    positives: Positives = EACH_FOR_ITSELF,
    rounds: Rounds = ON_ITS_OWN,
) -> Embeddings:
    """Each process embeds its share; all get all, in the pairs' own order.

    Raises:
        DataError: more of the pairs are unreadable than ``max_bad`` allows.
        Interrupted: as the check of ``rounds`` has it.
    """
    processes = rounds.processes
    share, device = Share(processes.rank, processes.count), loaded.precision.device
    options = LoaderOptions.of(settings, device, share, processes.on_this_machine)
    batch_size = settings.micro_batch_size or _BATCH
    batches = evaluation_batches(pairs, how.preprocessing, batch_size, options)
    embedded = embed(loaded.model, how.sides, batches, positives, rounds)
    _check_bad_share(embedded, len(pairs), settings)
    return embedded


def _check_bad_share(embedded: Embeddings, pairs: int, settings: Settings) -> None:
    """
    Raises:
        DataError: more than ``max_bad`` of the pairs, and more than one, are unreadable.
    """
    bad = embedded.skipped
    if settings.too_many_bad(len(bad), pairs):
        raise DataError(
            f"{len(bad)} of {pairs} validation pairs could not be used, more than --max-bad "
            f"{settings.max_bad:g}: first {bad[0].key} in {bad[0].shard} ({bad[0].reason})",
            "`clipft inspect` names what is broken; mend it, or raise --max-bad",
        )
