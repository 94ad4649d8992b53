"""A folder -> a repository of the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipft.core.errors import ModelError, UsageError, first_line


def make_repository(repo: str) -> str:
    """Make a private model repository, or find the one there is; returns its full name.

    Raises:
        UsageError: the name is none.
        ModelError: no network, no token, or no right to it.
    """
    from huggingface_hub import HfApi

    with _telling_of(repo):
        return str(HfApi().create_repo(repo, private=True, exist_ok=True).repo_id)


def push(folder: Path, repo: str) -> str:
    """Upload all files of ``folder`` in one commit; returns the page of the repository.

    Raises:
        ModelError: as ``make_repository``.
    """
    from huggingface_hub import HfApi

    with _telling_of(repo):
        api = HfApi()
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of clipft")
        return f"{api.endpoint}/{repo}"


@contextmanager
def _telling_of(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: no name for a repository", "as in me/my-clip") from error
    except LocalTokenNotFoundError as error:
        raise _no_right(repo, "no token") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in {401, 403}:
            raise _no_right(repo, f"the hub answers {status}") from error
        raise _failed(repo, error) from error
    except Exception as error:  # the transport's own kinds
        raise _failed(repo, error) from error


def _no_right(repo: str, why: str) -> ModelError:
    return ModelError(
        f"cannot push to {repo}: {why}",
        "log in with `hf auth login`, or set HF_TOKEN to a token that may write there",
    )


def _failed(repo: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot push to {repo}: {type(error).__name__}: {first_line(error)}",
        "check the network and HF_ENDPOINT, HF_HUB_OFFLINE; without --push all stays local",
    )
