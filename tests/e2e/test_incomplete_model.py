"""Every command that opens a model refuses one with random weights, by what is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clipft.cli.app import run
from clipft.models.source import model_source

SMALL = ["--epochs", "1", "--mini-train", "--num-workers", "0", "--device", "cpu"]
SMALL += ["--scenario", "text_lora"]


@pytest.fixture(scope="module")
def places(catalogue, tmp_path_factory) -> Iterator[dict[str, str]]:
    """A model without one of its layers, and a run that was trained while it was whole."""
    folder = tmp_path_factory.mktemp("incomplete")
    model = Path(shutil.copytree(model_source("tiny"), folder / "model"))
    given = {"model": model, "data": catalogue, "out": folder / "out"}
    places = {name: str(path) for name, path in given.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFT_CACHE", str(folder / "cache"))
        command = ["train", "--model", places["model"], "--data-dir", places["data"], *SMALL]
        assert run([*command, "--output-dir", places["out"]]) == 0
    (folder / "out" / "text_lora" / "result.json").unlink()  # as if it was killed at the end
    weights = load_file(model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "text_model.encoder.layers.1." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    yield places


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train --model {model} --data-dir {data} --output-dir {new} --scenario full", 5),
        ("resume --output-dir {out}", 5),
        ("find-batch-size --model {model}", 5),
        ("evaluate {out}/text_lora --data-dir {data}", 5),
        ("zero-shot {model} --data-dir {data}", 5),
        ("search {model} {data} lamp", 5),
        ("search {out}/text_lora {data} lamp", 5),
        ("export {model} {new}", 5),
        ("export {out}/text_lora {new}", 5),
        ("ablate --model {model} --data-dir {data} --output-dir {new}", 5),
        ("doctor --model {model} --data-dir {data} --output-dir {new}", 10),
    ],
)
def test_a_model_without_a_layer_is_refused(command, code, places, tmp_path, capsys):
    new = tmp_path / "new"
    given = [part.format(**places, new=new) for part in command.split(" ")]
    assert run(given) == code
    said = " ".join(capsys.readouterr().err.split())
    assert "16 weights of the model are not in the file: text_model.encoder.layers.1." in said
    assert not list(new.rglob("*.pt")) + list(new.rglob("*.safetensors"))
