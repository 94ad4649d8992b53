"""Checks of what a run reads and where it sends: pairs, model, bucket, W&B."""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clipft.config.settings import Settings
from clipft.core.errors import first_line
from clipft.doctor.finding import Finding

_SECONDS = 5
_PROBE = ".clipft-doctor"


def pairs(settings: Settings) -> Finding:
    """Are there shards? Only their names are looked at."""
    sides = {side: sorted((settings.data_dir / side).glob("*.tar")) for side in ("train", "val")}
    missing = [side for side, shards in sides.items() if not shards]
    if not missing:
        size = sum(shard.stat().st_size for shards in sides.values() for shard in shards)
        counts = " and ".join(f"{len(shards)} of {side}" for side, shards in sides.items())
        return Finding("ok", f"shards in {settings.data_dir}: {counts}, {size / 2**20:,.0f} MiB")
    if settings.s3_bucket:
        return Finding("ok", f"to be fetched from bucket {settings.s3_bucket}")
    return Finding(
        "warning",
        f"no {' and no '.join(f'{side}/*.tar' for side in missing)} in {settings.data_dir}",
        "name the folder with --data-dir, or make it: `clipft pack PHOTOS FOLDER`",
    )


def model(settings: Settings) -> Finding:
    """A local or cached model is really loaded; of another the hub is asked whether it has it."""
    from clipft.models.pretrained import TINY, load_pretrained, looks_local

    name = settings.model
    if name == TINY or looks_local(name):
        base = load_pretrained(name)
        return Finding("ok", f"{name} loads, {base.parameters_count:,} parameters")
    cached = _cached(name)
    if cached is None:
        return _on_hub(name)
    base = load_pretrained(cached)
    return Finding("ok", f"{name} loads from the cache, {base.parameters_count:,} parameters")


def _cached(name: str) -> str | None:
    """The folder of a hub model that is here already, with weights and all."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    weights = [p for ending in ("safetensors", "bin") for p in Path(folder).glob(f"*.{ending}")]
    return folder if weights else None


def _on_hub(name: str) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    instead = "--model takes a local folder too, and --model tiny needs no network"
    try:
        found = HfApi().model_info(name, timeout=_SECONDS)
    except GatedRepoError:
        return Finding(
            "error", f"{name} asks for consent on the hub", "give it, then `hf auth login`"
        )
    except (RepositoryNotFoundError, HFValidationError):
        return Finding("error", f"the hub has no model {name}", f"check the name; {instead}")
    except Exception as error:  # of httpx, of sockets, or of the offline mode
        return Finding(
            "error",
            f"{name} is not in the cache, and the hub cannot be asked "
            f"({type(error).__name__}: {first_line(error)})",
            f"mend the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies); {instead}",
        )
    return Finding("ok", f"{found.id} is on the hub, to be fetched by the first run")


def bucket(settings: Settings) -> Finding:
    """Credentials, address and rights, as ``sync`` and the upload of checkpoints need them."""
    if not settings.s3_bucket:
        if settings.enable_s3_checkpoints:
            return Finding(
                "error", "--enable-s3-checkpoints without a bucket", "name it with --s3-bucket"
            )
        return Finding("ok", "no bucket is set")
    from clipft.storage.s3.client import open_bucket

    at_once = settings.model_copy(update={"s3_patience": 0.0})
    opened = open_bucket(at_once)
    prefix = settings.s3_prefix.strip("/") + "/"
    if not opened.holds(prefix):
        return Finding(
            "warning",
            f"{opened.url(prefix)} can be listed and is empty",
            "check --s3-prefix; raw pairs or shards belong there",
        )
    if settings.enable_s3_checkpoints:
        _write_to(opened, settings)
        return Finding("ok", f"{opened.url(prefix)} can be listed, checkpoints can be uploaded")
    return Finding("ok", f"{opened.url(prefix)} can be listed")


def _write_to(opened: Any, settings: Settings) -> None:
    """Put an empty object where checkpoints go, and take it away.

    Raises:
        StorageError: one of the two is refused.
    """
    key = f"{settings.s3_checkpoint_prefix.strip('/')}/{_PROBE}-{os.getpid()}"
    opened.call("put_object", key, Key=key, Body=b"")
    opened.call("delete_object", key, Key=key)


def tracking(settings: Settings) -> Finding:
    """W&B never stops a run: what is wrong with it is a warning."""
    if settings.wandb == "disabled":
        return Finding("ok", "off")
    try:
        import wandb
    except ImportError as error:
        return Finding("warning", f"wandb does not load: {error}", "`pip install wandb`")
    if settings.wandb == "offline":
        return Finding("ok", f"wandb {wandb.__version__}, offline: `wandb sync` sends a run later")
    address = wandb.setup().settings.base_url
    if not wandb.login(host=address, prompt=False):
        return Finding("warning", f"no key for {address}", "`wandb login`, or set WANDB_API_KEY")
    return _reached(address)


def _reached(address: str) -> Finding:
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return Finding(
            "warning",
            f"{address} cannot be reached: {error.strerror or error}",
            "use --wandb offline, and `wandb sync` later; training goes on without it",
        )
    return Finding("ok", f"{address} is there, and so is a key")
