"""Checks access to the pairs, the model, the bucket and W&B."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from clipft.config.settings import Settings
from clipft.core.errors import UsageError, first_line
from clipft.data.shards.names import tars_in
from clipft.doctor import Finding
from clipft.runs.trackers import check_installed

_SECONDS = 5


def pairs(settings: Settings) -> Finding:
    """Find the shards. Only their names and sizes are read."""
    shards = {side: tars_in(settings.data_dir / side) for side in ("train", "val")}
    missing = [f"{side}/*.tar" for side, found in shards.items() if not found]
    if not missing:
        size = sum(path.stat().st_size for found in shards.values() for path in found)
        counts = " and ".join(f"{len(found)} for {side}" for side, found in shards.items())
        return Finding("ok", f"shards in {settings.data_dir}: {counts}, {size / 2**20:,.0f} MiB")
    if settings.s3_bucket:
        return Finding("ok", f"to be downloaded from bucket {settings.s3_bucket}")
    return Finding(
        "warning",
        f"no {' and no '.join(missing)} in {settings.data_dir}",
        "name the folder with --data-dir, or create it with `clipft pack PHOTOS FOLDER`",
    )


def model(settings: Settings) -> Finding:
    """Load a local or cached model. For any other model, ask the hub whether it exists."""
    from clipft.models.open_clip.names import is_open_clip
    from clipft.models.pretrained import load_pretrained
    from clipft.models.source import TINY, looks_local

    name = settings.model
    if name == TINY or looks_local(name) or is_open_clip(name):
        base = load_pretrained(name)
        found = f"{name} loads, {base.parameters_count:,} parameters"
        return Finding("ok", f"{found} ({base.conversion})" if base.conversion else found)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return _on_hub(name)
    # A folder in the cache may contain only the configuration
    if not [*cached.glob("*.safetensors"), *cached.glob("*.bin")]:
        return _on_hub(name)
    base = load_pretrained(str(cached))
    return Finding("ok", f"{name} loads from the cache, {base.parameters_count:,} parameters")


def _on_hub(name: str) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    instead = "--model also takes a local folder, and --model tiny needs no network"
    try:
        found = HfApi().model_info(name, timeout=_SECONDS)
    except GatedRepoError:
        hint = "accept its terms on the hub, then run `hf auth login`"
        return Finding("error", f"{name} is a gated model", hint)
    except (RepositoryNotFoundError, HFValidationError):
        return Finding("error", f"the hub has no model {name}", f"check the name; {instead}")
    except Exception as error:  # from httpx, from sockets, or because of the offline mode
        return Finding(
            "error",
            f"{name} is not in the cache, and the hub cannot be reached "
            f"({type(error).__name__}: {first_line(error)})",
            f"check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies); {instead}",
        )
    return Finding("ok", f"{found.id} is on the hub; the first run will download it")


def bucket(settings: Settings) -> Finding:
    """List the bucket. If checkpoints are to be uploaded, write an empty object and delete it.

    Raises:
        StorageError: Credentials, address or permissions are wrong.
    """
    if not settings.s3_bucket:
        if settings.enable_s3_checkpoints:
            found = "--enable-s3-checkpoints is set without a bucket"
            return Finding("error", found, "name the bucket with --s3-bucket")
        return Finding("ok", "no bucket is set")
    from clipft.storage.s3.client import open_bucket

    # Without retries, so that the check does not wait
    opened = open_bucket(settings.model_copy(update={"s3_retry_timeout": 0.0}))
    prefix = settings.s3_prefix.strip("/") + "/"
    listed = f"{opened.url(prefix)} can be listed"
    if not any(opened.entries(prefix, page_size=1)):
        hint = "check --s3-prefix: it should hold raw pairs or shards"
        return Finding("warning", f"{listed} and is empty", hint)
    if not settings.enable_s3_checkpoints:
        return Finding("ok", listed)
    key = f"{settings.s3_checkpoint_prefix.strip('/')}/.clipft-doctor-{os.getpid()}"
    opened.call("put_object", key, Key=key, Body=b"")
    opened.call("delete_object", key, Key=key)
    return Finding("ok", f"{listed}, checkpoints can be uploaded")


def tracking(settings: Settings) -> Finding:
    """Check that the trackers are installed, and check W&B. Problems with W&B are only warnings,
    because they never stop a run."""
    names = settings.tracker_names
    try:
        check_installed(names)
    except UsageError as error:
        return Finding("error", error.message, error.hint)
    if "wandb" not in names:
        return Finding("ok", ", ".join(names) or "off")
    try:
        import wandb
    except ImportError as error:
        return Finding("warning", f"wandb does not load: {error}", "run `pip install wandb`")
    if settings.wandb == "offline":
        return Finding(
            "ok", f"wandb {wandb.__version__}, offline: `wandb sync` uploads a run later"
        )
    address = wandb.setup().settings.base_url
    if not wandb.login(host=address, prompt=False):
        hint = "run `wandb login`, or set WANDB_API_KEY"
        return Finding("warning", f"there is no key for {address}", hint)
    return reachable(address)


def reachable(address: str) -> Finding:
    """Connect to the W&B server at ``address``, a URL."""
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return Finding(
            "warning",
            f"{address} cannot be reached: {error.strerror or error}",
            "use --wandb offline, and `wandb sync` later; training continues without it",
        )
    return Finding("ok", f"{address} can be reached, and there is a key")
