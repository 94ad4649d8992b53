"""OpenVINO and coremltools open what is exported for them, and compute what clipft computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipft.cli.app import run
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.folders import open_pairs
from clipft.export import mil
from clipft.export.coreml import CoreMl
from clipft.export.openvino import OpenVino, core
from clipft.export.towers import TowerInputs
from tests.exports import opened, write_checkpoint
from tests.inputs import preprocessing, tiny

RUNTIMES = {"openvino": OpenVino(), "coreml": CoreMl()}
SIZES = {"openvino": {"fp16": 0.56, "int8": 0.36}, "coreml": {"fp16": 0.56, "int8": 0.36}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "dual_lora")


@pytest.fixture(scope="module")
def batch(catalogue):
    pairs = open_pairs(catalogue / "val", limit=3)
    return next(evaluation_batches(pairs, preprocessing("none"), 3, LoaderOptions()))


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, checkpoint, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert run(["export", str(checkpoint), str(out), "--format", request.param]) == 0
    return request.param, out


def test_the_library_computes_the_same(exported, checkpoint, batch):
    name, out = exported
    model = opened(checkpoint).loaded.model.eval()
    with torch.inference_mode():
        expected = {
            "images": model.encode_images(batch.pixel_values),
            "texts": model.encode_texts(batch.input_ids),
        }
    found = TowerInputs(batch.pixel_values, batch.input_ids).by_tower(tiny())
    for kind, file in RUNTIMES[name].files.items():
        rows = RUNTIMES[name].open(out / file)(found[kind])
        assert float((rows - expected[kind]).abs().max()) < 1e-5
    card = (out / "README.md").read_text()
    assert ("Core ML itself was not run" in card) == (name == "coreml")


def test_openvino_takes_any_batch_and_length(exported, checkpoint):
    name, out = exported
    if name != "openvino":
        pytest.skip("the shapes of Core ML are fixed")
    compiled = core().compile_model(
        out / "openvino" / "text_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert compiled.input(0).any_name == "input_ids"
    assert compiled.output(0).any_name == "text_embeds"
    model = opened(checkpoint).loaded.model.eval()
    for rows, length in ((1, 3), (7, 20), (2, 77)):
        ids = torch.randint(1, 2558, (rows, length), generator=torch.Generator().manual_seed(rows))
        ids[:, -1] = tiny().tokenizer.eos_token_id
        with torch.inference_mode():
            expected = model.encode_texts(ids)
        assert np.abs(compiled(ids.numpy())[0] - expected.numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_lower_precision_is_smaller_and_its_loss_is_measured(
    name, precision, checkpoint, catalogue, batch, tmp_path, capsys
):
    out, runtime = tmp_path / "out", RUNTIMES[name]
    given = [str(checkpoint), str(out), "--format", name, "--precision", precision]
    assert run(["export", *given, "--data-dir", str(catalogue), "--max-loss", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[f"{name}_precision"]
    for kind, tower in found["towers"].items():
        before, after = tower["megabytes"]
        assert tower["precision"] == precision and after < SIZES[name][precision] * before
        assert (out / tower["file"]).exists() and not (out / runtime.files[kind]).exists()
        assert 0.99 < tower["cosine"] <= 1.0001
        assert (tower["milliseconds"] is None) == (name == "coreml")
    recall = found["recall"]
    assert recall["low"] <= recall["difference"] <= recall["high"]
    assert found["towers"]["images"]["file"] in (out / "README.md").read_text()


def test_a_program_with_an_unknown_operation_is_refused():
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))])
    def program(x):
        return mb.erf(x=x)

    with pytest.raises(ValueError, match="does not know its operation erf"):
        mil.run(program.functions["main"], torch.zeros(1, 4))


X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
FOLDED = {
    "softmax": {"x": X, "axis": 1},
    "matmul": {"x": X, "y": X, "transpose_y": True},
    "slice_by_index": {
        "x": X,
        "begin": [0, 1, 0],
        "end": [2, 3, 3],
        "end_mask": [True, False, False],
        "squeeze_mask": [False, False, False],
    },
    "gather": {"x": X, "indices": np.array([[2, 0], [1, 1]], np.int32), "axis": 1},
    "reduce_l2_norm": {"x": X, "axes": [2], "keep_dims": True},
    "reduce_argmax": {"x": X, "axis": 2, "keep_dims": False},
    "expand_dims": {"x": X, "axes": [0, 2]},
    "transpose": {"x": X, "perm": [2, 0, 1]},
    "cumsum": {"x": X, "axis": 1},
    "tile": {"x": X, "reps": [1, 2, 1]},
    "clip": {"x": X, "alpha": -0.5, "beta": 0.5},
}


@pytest.mark.parametrize("name", FOLDED)
def test_operations_give_what_coremltools_computes_of_constants(name):
    from coremltools.converters.mil import Builder as mb

    known = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))])
    def program(x):
        result = getattr(mb, name)(**FOLDED[name])
        known.append(result.val)
        return mb.cast(x=result, dtype="fp32") if result.val.dtype != np.float32 else result

    found = mil.run(program.functions["main"], torch.zeros(1))
    np.testing.assert_allclose(found.numpy(), known[0], atol=1e-5)
