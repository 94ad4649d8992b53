"""transformers.js opens an exported ONNX folder under node, and computes what onnxruntime does."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from clipft.cli.app import run
from clipft.data.demo.catalogue import render_pair

pytestmark = pytest.mark.slow  # npm fetches 100 MB

PACKAGE = "@huggingface/transformers@4"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
TEXTS = ["a light oak chair", "a black lamp that stands beside a sofa"]


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory) -> Path:
    """A folder where transformers.js is installed; its tests are skipped where it cannot be."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("node")
    # Without scripts: the one of onnxruntime-node downloads CUDA libraries
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr.strip()[-300:]}")
    return folder


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 0.999999), ("fp16", 0.999), ("int8", 0.999)])
def test_transformers_js_computes_the_same(dtype, least, node_folder, tmp_path):
    folder, photo = tmp_path / "model", tmp_path / "photo.png"
    given = ["--format", "onnx", "--precision", dtype]
    assert run(["export", "tiny", str(folder), *given]) == 0
    side = AutoImageProcessor.from_pretrained(folder).crop_size["height"]
    # Of the size of the model, because sharp and Pillow resize images a little differently
    render_pair(7, 1).image.convert("RGB").resize((side, side)).save(photo)
    command = ["node", str(SCRIPT), str(folder), dtype, str(photo), json.dumps(TEXTS)]
    done = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    suffix = "" if dtype == "fp32" else f"_{dtype}"
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="np")
    expected = {}
    for kind, name, inputs in (
        ("texts", "text", {"input_ids": tokens["input_ids"].astype(np.int64)}),
        ("images", "vision", {"pixel_values": pixels["pixel_values"]}),
    ):
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}_model{suffix}.onnx")
        expected[kind] = session.run(None, inputs)[0]
    for kind, rows in expected.items():
        cosines = (rows * np.array(found[kind], np.float32)).sum(1)
        assert cosines.min() > least, kind
