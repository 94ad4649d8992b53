"""Weights are read, and nothing but weights: code in a file is never run."""

import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipft.cli.app import run
from clipft.core.errors import ModelError
from clipft.models.open_clip.weights import read_weights
from clipft.models.pretrained import load_pretrained
from tests.models.open_clip.folders import CONFIG, changed, describe, make

OPENAI = changed({"head_width": 64, "mlp_ratio": 4}, {"width": 64, "heads": 1}, quick_gelu=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A TorchScript archive like OpenAI's: traced, in halves, with its three numbers."""
    path = tmp_path_factory.mktemp("archive") / "ViT-tiny.pt"
    model = make(OPENAI)
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    inputs = {
        "encode_image": (torch.ones(2, 3, 64, 64),),
        "encode_text": (torch.zeros(2, 77, dtype=torch.int),),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, inputs)
        torch.jit.save(traced.half(), str(path))
    return path


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_archive_of_openai_holds_the_same_tensors(archive):
    weights = read_weights(archive)
    expected = make(OPENAI).half().float().state_dict()
    assert weights.archived and weights.tensors.keys() == expected.keys()
    assert all(torch.equal(weights.tensors[name], expected[name]) for name in expected)


def test_an_archive_of_openai_is_a_model(archive, tmp_path):
    """Its shapes and OpenAI's customs say all: QuickGELU, and heads of width 64."""
    base = load_pretrained(str(archive))
    assert base.model.config.vision_config.hidden_act == "quick_gelu"
    assert base.inputs.image_size == 64
    state = make(OPENAI).half().state_dict()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    describe(tmp_path, OPENAI)
    assert base.fingerprint() == load_pretrained(f"local-dir:{tmp_path}").fingerprint()


def test_code_in_a_checkpoint_is_not_run(catalogue, tmp_path, capsys):
    trap = tmp_path / "trap"
    describe(tmp_path, CONFIG)
    torch.save({"state_dict": {"a": Trap(trap)}}, tmp_path / "model.bin")
    given = ["zero-shot", f"local-dir:{tmp_path}", "--data-dir", str(catalogue)]
    assert run(given) == 5
    printed = capsys.readouterr().err
    assert "clipft runs no code from a checkpoint: it asks for" in printed
    assert len([line for line in printed.splitlines() if line.startswith("error:")]) == 1
    assert not trap.exists()


def test_a_bare_pickle_is_refused_without_the_advice_of_torch(tmp_path, recwarn):
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ModelError) as raised:
        read_weights(path)
    assert str(raised.value).endswith("from a checkpoint: torch does not accept it as a state dict")
    assert not trap.exists() and not recwarn.list


def test_code_in_an_archive_is_not_run(archive, tmp_path):
    """Neither what is pickled in it nor its TorchScript."""
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(path, "w") as evil:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("/data.pkl"):
                data = pickle.dumps(Trap(trap), protocol=2)
            evil.writestr(name, data)
    with pytest.raises(ModelError, match=r"runs no code from a checkpoint: it asks for "):
        read_weights(path)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["archive", "state dict", "safetensors", "before 1.6"])
def test_a_truncated_file_is_refused(kind, archive, tmp_path):
    state = make(CONFIG).state_dict()
    path, whole = tmp_path / "x.pt", tmp_path / "whole"
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(state, whole)
    elif kind == "archive":
        whole = archive
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "state dict")
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="is truncated or damaged") as raised:
        read_weights(path)
    assert raised.value.exit_code == 5


WRONG = {
    "html": (b"<!DOCTYPE html><html>Sign in</html>", "is an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
    "text": (b"hello", "is not a checkpoint"),
    "empty": (b"", "is not a checkpoint"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_another_kind_is_refused(kind, suffix, tmp_path):
    data, message = WRONG[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_weights(path)


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="holds no state dict of a CLIP"):
        read_weights(tmp_path / "x.pt")


def test_an_archive_of_another_network_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2))
        torch.jit.save(traced, str(tmp_path / "linear.pt"))
    with pytest.raises(ModelError, match="is not a CLIP of OpenAI"):
        load_pretrained(str(tmp_path / "linear.pt"))
