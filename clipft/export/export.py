"""``export``: a tuned model -> one folder per format, each whole or not there at all."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from clipft import __version__
from clipft.config.settings import Settings
from clipft.core.errors import ModelError, UsageError, first_line
from clipft.core.files import check_writable, replacing_folder
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.embedding.embed import validation_pairs
from clipft.embedding.encoding import validation_preprocessing
from clipft.embedding.load import LoadedModel
from clipft.export.onnx import (
    OnnxCheck,
    OnnxInputs,
    check_onnx,
    check_onnx_installed,
    made_up_inputs,
    write_onnx,
)
from clipft.models import huggingface as folders
from clipft.runs.load import OpenedModel

FORMATS = ("transformers", "peft", "onnx", "sentence-transformers")
MARK = "clipft.json"
"""Tells an exported folder from anything else that may stand at its place."""

_CHECK_BATCH = 16
_CHECK_BATCHES = 16


@dataclass(frozen=True)
class Written:
    """What one export left: the folder of each format, and how the ONNX towers were checked."""

    folders: dict[str, Path]
    onnx: OnnxCheck | None = None


Card = Callable[[str, OnnxCheck | None], str]
"""(format) -> the text of its README.md; ``""`` stands for a folder of several formats."""


@dataclass
class Export:
    """The formats of one opened model, written under ``out``: into it where there is one
    format, else into a folder of each format's name. ``checked_on`` are the settings whose
    validation pairs ONNX is checked with; None: made-up inputs."""

    opened: OpenedModel
    out: Path
    formats: tuple[str, ...]
    card: Card
    note: Callable[[str], None]
    checked_on: Settings | None = None
    onnx: OnnxCheck | None = field(default=None, init=False)

    def write(self) -> Written:
        """
        Raises:
            StorageError: the disk refuses; what stood at ``out`` before is untouched.
            ModelError: ONNX and torch do not give the same.
        """
        several = len(self.formats) > 1
        # The adapter first: merging uses it up
        ordered = sorted(self.formats, key=lambda name: name != "peft")
        with replacing_folder(self.out) as temporary:
            temporary.mkdir(parents=True)
            for name in ordered:
                self.note(f"Writing {name} ...")
                folder = temporary / name if several else temporary
                _WRITERS[name](self, folder)
                self._describe(folder, name)
            if several:
                self._describe(temporary, "")
        written = {name: self.out / name if several else self.out for name in self.formats}
        return Written(written, self.onnx)

    def _describe(self, folder: Path, name: str) -> None:
        card = folder / "README.md"
        card.write_text(self.card(name, self.onnx), encoding="utf-8")
        for weights in folder.glob("*.safetensors"):  # made readable for their owner alone
            weights.chmod(card.stat().st_mode)
        mark = {
            "clipft": __version__,
            "format": name or list(self.formats),
            "base_model": folders.public_name(self.loaded.base.name),
            "base_fingerprint": self.loaded.fingerprint,
            "scenario": self.opened.settings.scenario,
        }
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")

    @property
    def loaded(self) -> LoadedModel:
        return self.opened.loaded

    @cached_property
    def merged(self) -> Any:
        return folders.merged(self.loaded.model)

    def write_transformers(self, folder: Path) -> None:
        folders.write_transformers(self.merged, self.loaded.base, folder)

    def write_peft(self, folder: Path) -> None:
        folders.write_adapter(self.loaded.model, self.loaded.base.name, folder)

    def write_sentence_transformers(self, folder: Path) -> None:
        folders.write_sentence_transformers(self.merged, self.loaded.base, folder)

    def write_onnx(self, folder: Path) -> None:
        base = self.loaded.base
        write_onnx(self.merged, base, folder)
        self.onnx = check_onnx(folder, self.merged, base, self._onnx_inputs())

    def _onnx_inputs(self) -> Iterator[OnnxInputs]:
        inputs, settings = self.loaded.base.inputs, self.checked_on
        if settings is None:
            yield from made_up_inputs(inputs)
            return
        pairs = validation_pairs(settings)
        preprocessing = validation_preprocessing(inputs, pairs, settings)
        options = LoaderOptions(workers=0)
        batches = evaluation_batches(pairs, preprocessing, _CHECK_BATCH, options)
        for batch in islice(batches, _CHECK_BATCHES):
            if len(batch):
                yield OnnxInputs(batch.pixel_values, batch.input_ids)


_WRITERS: dict[str, Callable[[Export, Path], None]] = {
    "transformers": Export.write_transformers,
    "peft": Export.write_peft,
    "onnx": Export.write_onnx,
    "sentence-transformers": Export.write_sentence_transformers,
}


def chosen_formats(asked: str, has_adapter: bool, scenario: str) -> tuple[str, ...]:
    """
    Raises:
        UsageError: an adapter is asked for of a scenario that has none, or a package is missing.
    """
    if asked == "peft" and not has_adapter:
        raise UsageError(
            f"--format peft: {scenario} trains no adapter",
            "use --format transformers, which holds all weights",
        )
    wanted = FORMATS if asked == "all" else (asked,)
    if "onnx" in wanted:
        check_onnx_installed()
    return tuple(name for name in wanted if name != "peft" or has_adapter)


def check_target(out: Path) -> None:
    """Before long work: may ``out`` be written, and is nothing of others' lost by it?

    Raises:
        UsageError: it is no export of clipft's and not empty.
        StorageError: it cannot be written there.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is not a folder", "name a folder that is yet to be made")
    if out.is_dir() and not (out / MARK).is_file() and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty and no earlier export: it has no {MARK}",
            "name a folder that is yet to be made",
        )
    check_writable(out.with_name(f".{out.name}.part"))


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
