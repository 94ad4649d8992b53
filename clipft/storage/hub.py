"""Uploads folders to the Hugging Face Hub, and downloads data sets from it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipft.core.errors import ModelError, UsageError, first_line

Kind = Literal["model", "dataset"]

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may {}"
_REACH = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
_WRITTEN = "hf://datasets/ORG/NAME"
_URL = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?(?:/(.*))?")


@dataclass(frozen=True)
class HubUrl:
    """A data set on the hub: its id, a revision ("" for the newest), and a folder or file in it
    ("" for all)."""

    id: str
    revision: str = ""
    within: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://datasets/{self.id}{revision}" + (f"/{self.within}" if self.within else "")


def parse_hub_url(text: object) -> HubUrl | None:
    """Parse ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]``; None for any other text.

    Raises:
        UsageError: The text begins with ``hf:/`` but is not such a URL.
    """
    # A Path object turns the two slashes after the scheme into one
    found = re.fullmatch(r"hf:/+(.*)", str(text), re.DOTALL | re.IGNORECASE)
    if not found:
        return None
    parsed = _URL.fullmatch(found[1].removeprefix("datasets/").rstrip("/"))
    if not parsed or not found[1].startswith("datasets/"):
        raise UsageError(f"{text} is not a data set of the hub", f"write it as {_WRITTEN}")
    # The hub's short name for the branch with a copy in Parquet
    revision = {"~parquet": "refs/convert/parquet"}.get(parsed[2], parsed[2] or "")
    return HubUrl(parsed[1], revision, (parsed[3] or "").strip("/"))


def download_dataset(url: HubUrl) -> Path:
    """Download a data set to the cache of the hub, unless it is there. Return its folder, or the
    file that ``url`` names. The files are links into the cache.

    Raises:
        UsageError: The id is not valid, or the data set has several configurations and ``url``
            names no folder.
        ModelError: The hub has no such data set, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _download_errors(url):
        if not url.within:
            _check_one_configuration(url)
        patterns = [url.within, f"{url.within}/*"] if url.within else None
        folder = snapshot_download(
            url.id, repo_type="dataset", revision=url.revision or None, allow_patterns=patterns
        )
    place = Path(folder) / url.within
    if not place.exists():
        raise ModelError(f"{url}: there is no {url.within} in the data set", "check the name")
    return place


def _check_one_configuration(url: HubUrl) -> None:
    """Refuse a data set whose card lists several configurations, because most images would be in
    more than one of them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = HfApi().dataset_info(url.id, revision=url.revision or None).card_data
    except HfHubHTTPError:
        raise
    except Exception:  # without a network, the data set may still be in the cache
        return
    names = [str(at.get("config_name")) for at in (card.get("configs") if card else None) or ()]
    if len(names) > 1:
        raise UsageError(
            f"{url} has several configurations: {', '.join(names[:20])}",
            f"name the folder with the files of one, as in {url}/FOLDER",
        )


@contextmanager
def _download_errors(url: HubUrl) -> Iterator[None]:
    """Turn the errors of a download into ``ClipftError``."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except UsageError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{url}: not a valid id", f"write it as {_WRITTEN}") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{url} is gated", f"accept its terms on the hub, then {_LOGIN.format('read it')}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no data set {url.id}, or it is private",
            f"check the name; if it is private, {_LOGIN.format('read it')}",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{url}: there is no such revision", "check the name") from error
    except Exception as error:  # the transport raises its own kinds
        raise ModelError(
            f"cannot download {url}: {type(error).__name__}: {first_line(error)}", _REACH
        ) from error


def make_repository(repo: str, kind: Kind) -> str:
    """Create a private repository unless it exists; return its full name.

    Raises:
        UsageError: the name is not valid.
        ModelError: there is no network, no token, or no permission.
    """
    from huggingface_hub import HfApi

    with _push_errors(repo):
        made = HfApi().create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        return str(made.repo_id)


def push(folder: Path, repo: str, kind: Kind, own: Sequence[str] = ()) -> str:
    """Upload all files of ``folder`` in one commit; return the repository's page.

    Files of an earlier upload that ``folder`` no longer has are deleted if their paths match one of
    the patterns in ``own``.

    Raises:
        ModelError: there is no network, no token, or no permission.
    """
    from huggingface_hub import HfApi

    with _push_errors(repo):
        api = HfApi()
        api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            commit_message="Upload from clipft",
            delete_patterns=list(own) or None,
        )
        return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"


@contextmanager
def _push_errors(repo: str) -> Iterator[None]:
    """Turn the errors of an upload into ``ClipftError``."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    login = _LOGIN.format("write there")
    try:
        yield
    except HFValidationError as error:
        raise UsageError(
            f"--push {repo}: not a valid repository name", "write it as in me/my-clip"
        ) from error
    except LocalTokenNotFoundError as error:
        raise ModelError(f"cannot push to {repo}: no token", login) from error
    except Exception as error:  # the transport raises its own kinds
        response = error.response if isinstance(error, HfHubHTTPError) else None
        status = response.status_code if response is not None else 0
        if status in {401, 403}:
            raise ModelError(f"cannot push to {repo}: the hub answers {status}", login) from error
        raise ModelError(
            f"cannot push to {repo}: {type(error).__name__}: {first_line(error)}",
            f"{_REACH}; leave out --push to keep the files on this machine only",
        ) from error
