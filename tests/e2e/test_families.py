"""Families besides CLIP through every command: train, resume, evaluate, search, embed, export."""

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.data.demo.catalogue import render_pair
from clipft.distributed.collectives import ALONE
from clipft.embedding.embed import embed_texts
from clipft.training.prepare import prepare
from tests.exports import opened
from tests.models.checkpoints import write_altclip, write_chinese_clip, write_naflex

KINDS = {"chinese_clip": write_chinese_clip, "altclip": write_altclip, "siglip2": write_naflex}
PLACE = ["--num-workers", "0", "--precision", "fp32"]


@pytest.fixture(scope="module", params=KINDS)
def trained(request, catalogue, tmp_path_factory) -> tuple[str, Path]:
    """The kind of a family, and the folder of a run that trained adapters of both towers."""
    parent = tmp_path_factory.mktemp(request.param)
    model = KINDS[request.param](parent / "model")
    given = [
        *("--model", str(model), "--data-dir", str(catalogue), "--output-dir", str(parent / "out")),
        *("--epochs", "1", "--effective-batch-size", "24", "--lora-r", "4", "--stop-on", "never"),
        *("--max-train-pairs", "48", "--lora-dropout", "0.1", "--lora-targets", "all", *PLACE),
    ]
    assert run(["train", *given, "--micro-batch-size", "24"]) == 0
    assert run(["train", *given, "--micro-batch-size", "7", "--output-dir", str(parent / "7")]) == 0
    return request.param, parent / "out" / "dual_lora"


def lines(folder: Path, kind: str) -> list[dict]:
    all_of_them = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in all_of_them if line["kind"] == kind]


def test_the_loss_is_that_of_the_effective_batch(trained):
    """However the pairs are cut into micro-batches, with dropout and with padding."""
    _, folder = trained
    cut = lines(folder.parent.parent / "7" / "dual_lora", "step")
    losses = [line["loss"] for line in lines(folder, "step")]
    assert losses == pytest.approx([line["loss"] for line in cut], rel=1e-4)
    before, after = lines(folder, "epoch")
    assert after["val_loss"] < before["val_loss"]


def test_what_runs_without_the_fast_encoder_is_said_once(trained, catalogue):
    kind, folder = trained
    small = {"effective_batch_size": 12, "micro_batch_size": 12, "num_workers": 0}
    given = {"model": str(folder.parent.parent / "model"), "data_dir": catalogue, **small}
    notes = list[str]()
    prepare(load_settings(given, environ={}).values, notes.append, ALONE)
    what = "its towers run" if kind == "siglip2" else "its text tower runs"
    assert " ".join(notes).count(f"{what} in the code of transformers") == 1


def test_it_is_evaluated_and_searched_and_embedded(trained, catalogue, tmp_path, capsys):
    _, folder = trained
    assert run(["evaluate", str(folder), "--data-dir", str(catalogue), "--json", *PLACE]) == 0
    told = json.loads(capsys.readouterr().out)
    (figures,) = (line["retrieval"] for line in lines(folder, "epoch")[1:])
    assert told["text_to_image"] == pytest.approx(figures["text_to_image"], abs=1e-3)
    given = ["search", str(folder), str(catalogue), "a red chair", "--json", "--num-workers", "0"]
    assert run(given) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    out = tmp_path / "embedded"
    assert run(["embed", str(folder), str(catalogue), str(out), "--num-workers", "0"]) == 0
    vectors = dict[str, torch.Tensor]()
    for path in (out / "images").glob("*.parquet"):
        rows = parquet.read_table(path).to_pylist()
        vectors |= {row["key"]: torch.tensor(row["vector"]) for row in rows}
    assert len(vectors) == 136
    best, second = (vectors[hit["key"]] for hit in found[:2])
    assert (best - second).abs().max() > 0


def test_its_export_opens(trained, tmp_path, capsys):
    kind, folder = trained
    place = tmp_path / "out"
    assert run(["export", str(folder), str(place), "--format", "transformers"]) == 0
    model, processor = AutoModel.from_pretrained(place), AutoProcessor.from_pretrained(place)
    padding = "max_length" if kind == "siglip2" else True
    made = processor(text=["a red chair", "lamp"], return_tensors="pt", padding=padding)
    with torch.no_grad():
        theirs = model.eval().get_text_features(**made).pooler_output
    assert theirs.shape[0] == 2 and torch.isfinite(theirs).all()
    for name in ["onnx", "open_clip"] if kind == "siglip2" else ["open_clip"]:
        assert run(["export", str(folder), str(tmp_path / name), "--format", name]) == 2
        error = capsys.readouterr().err
        assert f"--format {name}:" in error and "use --format transformers" in error


def test_sentence_transformers_embeds_the_same(trained, tmp_path):
    from sentence_transformers import SentenceTransformer

    _, folder = trained
    out = tmp_path / "out"
    assert run(["export", str(folder), str(out), "--format", "sentence-transformers"]) == 0
    texts = ["a red chair", "an oak table with 4 drawers"]
    model = SentenceTransformer(str(out), device="cpu")
    ours = torch.stack(list(embed_texts(opened(folder).loaded, texts)))
    torch.testing.assert_close(torch.from_numpy(model.encode(texts)), ours, atol=1e-5, rtol=1e-4)
    image = render_pair(3, 1).image.resize((90, 60))
    assert model.encode([image]).shape == (1, ours.shape[1])


def test_the_towers_of_chinese_clip_run_in_onnxruntime(tmp_path, capsys):
    base = write_chinese_clip(tmp_path / "base")
    assert run(["export", str(base), str(tmp_path / "out"), "--format", "onnx", "--json"]) == 0
    check = json.loads(capsys.readouterr().out)["onnx_check"]
    assert max(check["image_difference"], check["text_difference"]) < 1e-5
