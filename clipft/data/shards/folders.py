"""Opens the pairs of a folder of shards, and says what is wrong with a folder that has none."""

import math
import re
import shlex
from collections import Counter
from pathlib import Path

from clipft.config.settings import Settings
from clipft.core.common import counted, shell_command
from clipft.core.errors import DataError, UsageError
from clipft.core.files import did_you_mean_path
from clipft.data.packing.options import PackOptions
from clipft.data.shards.contents import PACK_HINT, contents_of, how_to_read
from clipft.data.shards.dataset import PairDataset
from clipft.data.shards.index import open_shard, printable
from clipft.data.shards.names import SPLITS, tars_in
from clipft.data.shards.tar import read_members


def open_pairs(folder: Path, limit: int = 0) -> PairDataset:
    """Open every ``*.tar`` of a folder, and use the first ``limit`` pairs (0: all).

    Raises:
        DataError: The folder does not exist, or has no tar (the message says what it has instead),
            or the tars have no complete pair.
    """
    paths = shard_paths(folder)
    dataset = PairDataset([open_shard(path) for path in paths], limit)
    if not len(dataset):
        raise _no_pair(folder, dataset)
    return dataset


def validation_pairs(settings: Settings) -> PairDataset:
    """Open ``{data_dir}/val``, or ``data_dir`` itself if the shards are directly in it.

    Raises:
        DataError: there are no pairs.
    """
    nested = settings.data_dir / "val"
    flat = not nested.exists() and tars_in(settings.data_dir)
    return open_pairs(settings.data_dir if flat else nested, settings.max_val_pairs)


def evaluation_pairs(settings: Settings, split: str = "auto") -> tuple[str, PairDataset]:
    """Open the pairs to evaluate, and return the name of their split with them.

    With ``split`` "auto", these are the test pairs if there are any, otherwise the validation
    pairs. "test" and "val" choose the split.

    Raises:
        DataError: there are no pairs.
    """
    test = settings.data_dir / "test"
    if split == "test" or (split == "auto" and tars_in(test)):
        return "test", open_pairs(test, settings.max_val_pairs)
    return "val", validation_pairs(settings)


def general_pairs(settings: Settings) -> PairDataset | None:
    """Open the general set that ``--preserve`` uses, or return None if none is given.

    It is ``{preserve_data}/train``, or ``preserve_data`` itself if the shards are directly in it.

    Raises:
        DataError: there are no pairs.
        UsageError: the settings of ``--preserve`` do not fit together.
    """
    if settings.preserve and settings.accumulation == "local":
        raise UsageError(
            "--preserve cannot be combined with --accumulation local",
            "use --accumulation exact, which is the default",
        )
    if settings.preserve_data is None:
        return None
    if not settings.preserve:
        raise UsageError(
            f"--preserve-data {settings.preserve_data} has no effect without a weight",
            "add --preserve 1, for example",
        )
    nested = settings.preserve_data / "train"
    flat = not nested.exists() and tars_in(settings.preserve_data)
    try:
        return open_pairs(settings.preserve_data if flat else nested)
    except DataError as error:
        error.hint = error.hint.replace("--data-dir", "--preserve-data")
        raise


def _no_pair(folder: Path, dataset: PairDataset) -> DataError:
    """Build the error for shards without pairs; it says what their members are."""
    shards = counted(len(dataset.shards), "shard")
    reasons = Counter(skipped.reason for skipped in dataset.skipped)
    why = "".join(f", {count:,} x {reason}" for reason, count in reasons.most_common(3))
    names = [
        member.name for member in read_members(dataset.shards[0].path) if member.kind == "file"
    ]
    first = f" (the first members are {', '.join(map(printable, names[:4]))})" if names else ""
    return DataError(
        f"no pair of image and caption in {shards} of {folder}{why}{first}",
        "in a shard, the .jpg and the .txt or .json of a pair have the same name up to the first "
        f"dot; {PACK_HINT}",
    )


def shard_paths(folder: Path) -> list[Path]:
    """Return every ``*.tar`` of a folder, sorted by name.

    Raises:
        DataError: The folder does not exist, or has no tar (the message says what it has instead).
    """
    paths = tars_in(folder)
    if paths:
        return paths
    if re.match(r"[a-z0-9]+:", str(folder)):
        raise DataError(
            f"{folder} is not a folder", "clipft reads no URLs or pipes: download the shards first"
        )
    if hint := _split_hint(folder):
        split = "training" if folder.name == "train" else "validation"
        raise DataError(f"there is no {split} split: no *.tar in {folder}", hint)
    if not folder.is_dir():
        raise _no_folder(folder)
    found = contents_of(folder)
    raise DataError(f"no .tar in {folder}: found {found}", how_to_read(folder, found))


def _no_folder(folder: Path) -> DataError:
    """Build the error for a folder that does not exist; it says what its parent has instead."""
    above = folder.parent if folder.name in SPLITS else folder
    if above.is_dir() and not any(tars_in(above / split) for split in SPLITS):
        found = contents_of(above)
        if found.endings:
            hint = how_to_read(above, found)
            return DataError(f"no folder {folder}: {above} holds {found}", hint)
    return DataError(
        f"no folder {folder}",
        did_you_mean_path(above)
        or "name the folder that has train/ and val/ in it with --data-dir, make it with "
        "`clipft pack`, or fetch it with `clipft sync`",
    )


def _split_hint(folder: Path) -> str:
    """Return a hint with the command that splits the pairs, if ``folder`` is a train or val folder
    without shards and there are shards that were never split; otherwise ""."""
    whole = folder.parent if folder.name == "train" else folder.parent / "train"
    if folder.name not in {"train", "val"} or any(folder.glob("[!.]*")):
        return ""
    if folder.name == "val" and not tars_in(whole):
        whole = folder.parent
    pairs = sum(len(open_shard(path)) for path in tars_in(whole))
    if pairs < 2:
        return ""
    root = folder.parent if folder.parent.name not in {"", ".."} else folder.parent.resolve()
    target = root.with_name(f"{root.name}-split")
    share = max(PackOptions.model_fields["val_share"].default, math.ceil(100 / pairs) / 100)
    packing = shell_command("pack", whole, target, "--val-share", f"{share:g}")
    return f"split the pairs with `{packing}`, then use --data-dir {shlex.quote(str(target))}"
