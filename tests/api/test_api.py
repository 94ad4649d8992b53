"""``from clipft import ...``, as another program uses it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipft
from clipft.data.demo.catalogue import render_pair

SMALL = {
    "model": "tiny",
    "epochs": 2,
    "effective_batch_size": 32,
    "micro_batch_size": 16,
    "num_workers": 0,
    "precision": "fp32",
    "device": "cpu",
    "lr": 1e-3,
    "resamples": 20,
}


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("api")
    return clipft.train({**SMALL, "data_dir": catalogue, "output_dir": out})


def test_importing_loads_nothing():
    code = (
        "import sys, clipft; dir(clipft); "
        "print([m for m in ('torch', 'pydantic', 'rich', 'typer', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_is_there_and_no_other():
    for name in clipft.__all__:
        assert getattr(clipft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = clipft.trian


class Recorder(clipft.TrainingCallback):
    """Counts the steps, and leaves the other methods to the base class."""

    def __init__(self) -> None:
        self.steps = 0

    def stepped(self, result) -> None:
        self.steps += 1


def test_former_names_are_still_accepted(catalogue, tmp_path):
    from clipft import Watchers

    assert Watchers is clipft.Callbacks
    recorder, where = Recorder(), {"data_dir": catalogue, "output_dir": tmp_path}
    saved: list[int] = []
    watchers = Watchers(observer=recorder, saved=lambda path, step: saved.append(step))
    result = clipft.train({**SMALL, **where, "epochs": 1}, watchers=watchers)
    assert recorder.steps == result.steps == 3
    assert saved[-1] == 3
    assert Watchers(recorder).callback is recorder


@pytest.mark.slow
def test_type_checkers_see_the_names(tmp_path):
    file = tmp_path / "user.py"
    file.write_text("import clipft\nreveal_type(clipft.load_model)\nclipft.train(3)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", str(file)],
        capture_output=True,
        text=True,
        cwd=Path(clipft.__file__).parent.parent,
    )
    assert "TunedModel" in done.stdout
    assert 'has incompatible type "int"' in done.stdout


@pytest.mark.slow
def test_a_run_leaves_the_same_files_as_one_of_the_command_line(trained, catalogue, tmp_path):
    from clipft.cli.app import run

    flags = [w for n, v in SMALL.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    assert run(["train", *flags, "--data-dir", str(catalogue), "--output-dir", str(tmp_path)]) == 0
    theirs = tmp_path / "dual_lora"
    ours = {path.name for path in trained.folder.iterdir()}
    assert ours == {path.name for path in theirs.iterdir()}
    for name in ("result.json", "evaluation.json"):
        one, other = (json.loads((f / name).read_text()) for f in (trained.folder, theirs))
        for place in ("run_dir", "checkpoint"):
            one.pop(place, None)
            other.pop(place, None)
        assert one == other


def test_a_scenario_brings_its_learning_rate_and_errors_have_codes(tmp_path):
    assert clipft.load_settings({"scenario": "linear_probe"}).values.lr == 1e-3
    with pytest.raises(clipft.ClipftError) as caught:
        clipft.train({**SMALL, "data_dir": tmp_path, "output_dir": tmp_path})
    assert caught.value.exit_code == 3
    with pytest.raises(clipft.ClipftError, match="only the command line uploads"):
        clipft.train(clipft.Settings(s3_bucket="x", enable_s3_checkpoints=True))


def test_evaluate_gives_the_figures_of_the_run(trained):
    judged = clipft.evaluate(trained.folder)
    left = json.loads((trained.folder / "evaluation.json").read_text())
    ours = json.loads(json.dumps(judged.to_dict()["evaluation"]))
    assert ours["after"]["paired"] == left["after"]["paired"]
    fewer = clipft.evaluate(trained.folder, {"max_val_pairs": 20})
    assert fewer.settings.max_val_pairs == 20
    assert fewer.to_dict()["pairs"] == 20


def test_a_loaded_model_ranks_as_the_run_measured(trained):
    """Two of 40 pairs may differ, because the processor resizes slightly differently."""
    tuned = clipft.load_model(trained.folder)
    pairs = [render_pair(7, number) for number in range(1000, 1040)]
    inputs = tuned.processor(
        text=[pair.caption for pair in pairs],
        images=[as_stored(pair.image) for pair in pairs],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = tuned.model(**inputs).logits_per_text
    right = (logits.argmax(1) == torch.arange(40)).float().mean().item()
    best = (trained.best or trained.before).retrieval
    assert right == pytest.approx(best["text_to_image"]["r@1"], abs=0.051)


def as_stored(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Image.open(buffer)


def test_an_exported_folder_and_a_pretrained_model_load_too(trained, tmp_path):
    from clipft.cli.app import run

    assert run(["export", str(trained.folder), str(tmp_path / "out")]) == 0
    ours, exported = clipft.load_model(trained.folder), clipft.load_model(tmp_path / "out")
    weights = exported.model.state_dict()
    for name, weight in ours.model.state_dict().items():
        assert torch.allclose(weight, weights[name], atol=1e-6), name
    assert clipft.load_model("tiny").settings.scenario == "zero_shot"


def test_the_example_in_the_docs_runs(catalogue, tmp_path, monkeypatch):
    page = (Path(clipft.__file__).parent.parent / "docs" / "python.md").read_text("utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalogue").symlink_to(catalogue)
    for name, value in (("NUM_WORKERS", "0"), ("DEVICE", "cpu"), ("PRECISION", "fp32")):
        monkeypatch.setenv(f"CLIPFT_{name}", value)
    names: dict[str, object] = {}
    exec(example.replace('"epochs": 3', '"epochs": 1'), names)
    assert names["vector"].shape[0] == 1
    for name in clipft.__all__:
        assert f"`{name}" in page or f" {name}" in page
