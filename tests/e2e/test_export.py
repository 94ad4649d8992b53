"""The library of each format opens the exported folder and computes what clipft computes."""

import json
import os
import re
import resource
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from clipft.cli.app import run
from clipft.config.scenarios import SCENARIOS
from clipft.core.errors import ModelError
from clipft.data.loader import LoaderOptions, evaluation_batches
from clipft.data.shards.folders import open_pairs
from clipft.embedding.embed import embed_texts
from clipft.export.target import FORMATS
from tests.exports import opened, write_checkpoint
from tests.inputs import preprocessing, tiny

LORA = [name for name, scenario in SCENARIOS.items() if scenario.lora]
LONG = "a black lamp with a long and slender foot that stands beside a chair " * 4
"""Nearly as long as the model's context."""
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(folder, name) for name in SCENARIOS}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory, catalogue) -> Path:
    """Export every format of a dual_lora checkpoint."""
    out = tmp_path_factory.mktemp("exports") / "all"
    given = ["export", str(checkpoints["dual_lora"]), str(out), "--format", "all"]
    assert run([*given, "--data-dir", str(catalogue)]) == 0
    return out


@pytest.fixture(scope="module")
def batch(catalogue):
    pairs = open_pairs(catalogue / "val", limit=12)
    return next(evaluation_batches(pairs, preprocessing("none"), 12, LoaderOptions()))


@pytest.fixture(scope="module")
def image_files(catalogue, tmp_path_factory) -> list[Path]:
    """Write some images of the catalogue as lossless files."""
    from clipft.data.images.decode import decode_image

    folder, pairs = tmp_path_factory.mktemp("images"), open_pairs(catalogue / "val", limit=4)
    for number in range(4):
        decode_image(pairs[number].image).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def ours(checkpoint, batch) -> tuple[torch.Tensor, torch.Tensor]:
    model = opened(checkpoint).loaded.model.eval()
    with torch.inference_mode():
        return model.encode_images(batch.pixel_values), model.encode_texts(batch.input_ids)


def normalized(batch) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tiny().mean, tiny().std))
    return (batch.pixel_values / 255 - mean) / std


def theirs(clip, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        images = clip.get_image_features(pixel_values=normalized(batch)).pooler_output
        texts = clip.get_text_features(input_ids=batch.input_ids).pooler_output
    return normalize(images, dim=-1), normalize(texts, dim=-1)


def assert_same(one, other, tolerance=1e-5) -> None:
    for mine, yours in zip(one, other, strict=True):
        assert float((torch.as_tensor(mine) - torch.as_tensor(yours)).abs().max()) <= tolerance


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_transformers_computes_the_same(scenario, checkpoints, batch, tmp_path):
    from transformers import CLIPModel

    out = tmp_path / "out"
    assert run(["export", str(checkpoints[scenario]), str(out)]) == 0
    clip, info = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(theirs(clip.eval(), batch), ours(checkpoints[scenario], batch))
    scale = opened(checkpoints[scenario]).loaded.model.logit_scale
    assert torch.equal(clip.logit_scale, scale)


def test_the_pipeline_classifies_as_the_model_does(exported, checkpoints, image_files):
    from transformers import pipeline

    labels = ["a chair", "a table", "a green lamp"]
    folder = str(exported / "transformers")
    classify = pipeline("zero-shot-image-classification", model=folder, device="cpu")
    found = classify(str(image_files[0]), candidate_labels=labels, hypothesis_template="{}")
    scores = {entry["label"]: entry["score"] for entry in found}
    image, texts = embedded(checkpoints["dual_lora"], image_files[:1], labels, classify)
    scale = opened(checkpoints["dual_lora"]).loaded.model.logit_scale.exp().item()
    expected = (scale * image @ texts.T).softmax(-1)[0]
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-4)


def embedded(checkpoint, files, texts, from_pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed with our model the pixels that the folder's own image processor makes."""
    model = opened(checkpoint).loaded.model.eval()
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = from_pipeline.image_processor(images, return_tensors="pt")["pixel_values"]
    ids = from_pipeline.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        features = model.clip.get_image_features(pixel_values=pixels).pooler_output
        return normalize(features, dim=-1), model.encode_texts(ids)


@pytest.mark.parametrize("scenario", LORA)
def test_peft_computes_the_same(scenario, checkpoints, batch, tmp_path):
    from peft import PeftModel

    from clipft.models.pretrained import load_pretrained

    out = tmp_path / "out"
    assert run(["export", str(checkpoints[scenario]), str(out), "--format", "peft"]) == 0
    model = PeftModel.from_pretrained(load_pretrained("tiny").model, out).eval()
    assert_same(theirs(model, batch), ours(checkpoints[scenario], batch))
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    )


@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - set(LORA)))
def test_a_scenario_without_adapter_has_no_peft_export(scenario, checkpoints, tmp_path, capsys):
    given = ["export", str(checkpoints[scenario]), str(tmp_path / "out"), "--format"]
    assert run([*given, "peft"]) == 2
    printed = capsys.readouterr().err
    assert f"{scenario} trains no adapter" in printed and "--format transformers" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows, length", [(1, 3), (7, 20), (2, 77)])
def test_onnx_computes_the_same_for_any_shape(rows, length, exported, checkpoints, batch):
    import onnxruntime

    folder, model = exported / "onnx", opened(checkpoints["dual_lora"]).loaded.model.eval()
    ids = torch.randint(1, 2558, (rows, length), generator=torch.Generator().manual_seed(rows))
    ids[:, -1] = ids[0, length // 2 :] = tiny().tokenizer.eos_token_id
    pixels = normalized(batch)[:rows]
    images = onnxruntime.InferenceSession(folder / "onnx" / "vision_model.onnx")
    texts = onnxruntime.InferenceSession(folder / "onnx" / "text_model.onnx")
    found = (
        images.run(None, {"pixel_values": pixels.numpy()})[0],
        texts.run(None, {"input_ids": ids.numpy()})[0],
    )
    with torch.inference_mode():
        expected = model.encode_images(batch.pixel_values[:rows]), model.encode_texts(ids)
    assert_same(found, expected)
    assert np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.52), ("int8", 0.36)])
def test_a_lower_precision_is_smaller_and_its_loss_is_measured(
    precision, share, checkpoints, catalogue, batch, tmp_path, capsys
):
    import onnxruntime

    out = tmp_path / "onnx"
    given = [str(checkpoints["dual_lora"]), str(out), "--format", "onnx", "--precision", precision]
    assert run(["export", *given, "--data-dir", str(catalogue), "--max-loss", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["onnx_precision"]
    assert {path.name for path in (out / "onnx").iterdir()} == {
        f"vision_model_{precision}.onnx",
        f"text_model_{precision}.onnx",
    }
    for tower in found["towers"].values():
        before, after = tower["megabytes"]
        assert tower["precision"] == precision and after < share * before
        assert 0.99 < tower["cosine"] < 1
    images, texts = (
        onnxruntime.InferenceSession(out / "onnx" / f"{name}_model_{precision}.onnx")
        for name in ("vision", "text")
    )
    pixels, ids = normalized(batch).numpy(), batch.input_ids.numpy()
    rows = images.run(None, {"pixel_values": pixels})[0], texts.run(None, {"input_ids": ids})[0]
    for row, expected in zip(rows, ours(checkpoints["dual_lora"], batch), strict=True):
        assert (row * expected.numpy()).sum(1).min() > 0.99
    recall = found["recall"]
    assert found["pairs"] == 40 and recall["low"] <= recall["difference"] <= recall["high"]
    assert recall["difference"] == pytest.approx(recall["after"] - recall["before"])
    card = (out / "README.md").read_text()
    assert f"onnx/vision_model_{precision}.onnx" in card and "R@10 over 40 pairs" in card


def test_a_precision_that_costs_too_much_is_refused():
    from clipft.export.reduce import Reduced, check_loss

    recall = {"before": 30.0, "after": 28.5, "difference": -1.5, "low": -2.0, "high": -1.0}
    check_loss(Reduced({}, 40, recall), 2)
    check_loss(Reduced({}, 40, recall), None)
    with pytest.raises(ModelError, match=r"from 30\.0 to 28\.5 points, by more than --max-loss 1"):
        check_loss(Reduced({}, 40, recall), 1)


@pytest.mark.parametrize(
    "given", [("--precision", "int8"), ("--format", "onnx", "--max-loss", "1")]
)
def test_a_precision_without_effect_is_refused_before_the_work(given, tmp_path, capsys):
    assert run(["export", "no-such-model", str(tmp_path / "out"), *given]) == 2
    assert "--precision" in capsys.readouterr().err


def test_onnx_that_gives_no_number_is_refused(exported, checkpoints):
    from clipft.export.onnx import Onnx
    from clipft.export.towers import made_up_inputs
    from clipft.models.huggingface import merged

    loaded = opened(checkpoints["dual_lora"]).loaded
    clip, inputs = merged(loaded.model), made_up_inputs(loaded.base.inputs)
    Onnx().check(exported / "onnx", clip, loaded.base, inputs)
    with torch.no_grad():
        clip.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="onnxruntime differs from torch by inf"):
        Onnx().check(exported / "onnx", clip, loaded.base, inputs)


def test_sentence_transformers_computes_the_same(exported, checkpoints, image_files):
    from sentence_transformers import SentenceTransformer
    from transformers import pipeline

    captions = ["a light oak chair", LONG]
    model = SentenceTransformer(str(exported / "sentence-transformers"), device="cpu")
    found = (model.encode([Image.open(p) for p in image_files]), model.encode(captions))
    folder = str(exported / "transformers")
    reader = pipeline("zero-shot-image-classification", model=folder, device="cpu")
    assert_same(found, embedded(checkpoints["dual_lora"], image_files, captions, reader))
    assert np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)


def test_our_preprocessing_gives_nearly_the_same_embeddings_as_the_folders(exported, image_files):
    from clipft.search.vectors import embed_image

    model = opened(exported / "transformers")
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(str(exported / "sentence-transformers"), device="cpu")
    for file, vector in zip(
        image_files, other.encode([Image.open(p) for p in image_files]), strict=True
    ):
        own = embed_image(model, file.read_bytes(), file.name)
        assert float(own @ torch.from_numpy(vector)) > 0.999


@pytest.mark.parametrize("kind", ["transformers", "onnx", "sentence-transformers"])
def test_texts_are_truncated_at_the_end_of_the_models_context(kind, exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported / kind)
    for text, length in ((LONG, None), (f"{LONG} {LONG}", 77)):
        ids = tokenizer([text, "a"], truncation=True, padding=True)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        assert len(ids[0]) == (length or len(whole)) > 50
        assert ids[0][:50] == whole[:50]


def test_each_card_has_valid_metadata_and_the_facts_of_the_run(exported):
    from huggingface_hub import ModelCard

    for kind in FORMATS:
        card = ModelCard.load(exported / kind / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == kind
        assert "clip" in card.data.tags
        for fact in (
            "dual_lora",
            "96 image-text pairs",
            "R@10",
            "30.0%",
            "lora_r: `16`",
            "epoch 2",
        ):
            assert fact in card.text, fact
    assert "Checked with onnxruntime" in (exported / "onnx" / "README.md").read_text()


def test_nothing_names_this_machine_and_all_weights_are_safetensors(exported, catalogue):
    private = [str(exported.parent), str(catalogue), str(REPOSITORY), os.path.expanduser("~/")]
    files = [path for path in exported.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not [place for place in private if place.encode() in content], path
        assert b"site-packages" not in content, path
    runtimes = {"openvino", "coreml"}  # which have formats of their own
    suffixes = {p.suffix for p in files if not runtimes & set(p.relative_to(exported).parts)}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files}
    assert len(modes) == 1, "all as readable as each other"


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"coreml"}))  # it needs macOS
def test_the_code_of_each_card_runs_unchanged(kind, exported, image_files, tmp_path, monkeypatch):
    card = (exported / kind / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code
    Image.open(image_files[0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert run(["export", "tiny", "base"]) == 0
    text = code[1].replace("PATH/TO/THIS/FOLDER", str(exported / kind))
    exec(compile(text.replace("PATH/TO/tiny", "base"), kind, "exec"), {})


def test_the_documents_show_the_same_code():
    page = (REPOSITORY / "docs" / "guides" / "export.md").read_text()
    for kind in FORMATS:
        name = f"use_{kind.replace('-', '_')}.py.txt"
        shown = (REPOSITORY / "clipft" / "export" / "assets" / name).read_text()
        assert shown.replace("$base", "openai/clip-vit-base-patch32") in page, kind


@pytest.mark.slow
def test_cards_give_the_temperature_and_bias_that_a_format_cannot_store(tmp_path, batch):
    from peft import PeftModel
    from transformers import CLIPModel

    from clipft.models.pretrained import load_pretrained

    checkpoint = write_checkpoint(tmp_path, "dual_lora", loss="siglip")
    out = tmp_path / "out"
    given = ["export", str(checkpoint), str(out), "--format", "all"]
    assert run(given) == 0
    clip, info = CLIPModel.from_pretrained(out / "transformers", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_same(theirs(clip.eval(), batch), ours(checkpoint, batch))
    model = opened(checkpoint).loaded.model
    bias = f"bias of {model.logit_bias.item():.6f}"
    for kind in FORMATS:
        said = bias in (out / kind / "README.md").read_text()
        assert said == (kind != "open_clip"), kind  # whose CLIP stores it
    code = re.search(r"`(model\.logit_scale\S+)`", (out / "peft" / "README.md").read_text())
    assert code
    loaded = PeftModel.from_pretrained(load_pretrained("tiny").model, out / "peft")
    exec(code[1], {"model": loaded})
    assert loaded.logit_scale.item() == pytest.approx(model.logit_scale.item(), abs=1e-5)


def test_the_card_of_the_best_epoch_has_the_intervals_of_the_evaluation(checkpoints, tmp_path):
    figure = {"value": 0.5, "low": 0.4, "high": 0.61}
    names = ("r@1", "r@5", "r@10", "median_rank")
    sides = {
        d: {"figures": dict.fromkeys(names, figure)} for d in ("text_to_image", "image_to_text")
    }
    (tmp_path / "best.pt").write_bytes(checkpoints["full"].read_bytes())
    evaluation = {"before": {"paired": sides}, "after": {"paired": sides}, "difference": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert run(["export", str(tmp_path), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50.0% (40.0% to 61.0%)" in card and "95% intervals" in card


def test_an_earlier_export_is_replaced_and_anything_else_is_not(checkpoints, tmp_path, capsys):
    out, checkpoint = tmp_path / "out", str(checkpoints["zero_shot"])
    out.mkdir()
    assert run(["export", checkpoint, str(out)]) == 0  # an empty folder may be used
    (out / "left-over").touch()
    assert run(["export", checkpoint, str(out), "--format", "sentence-transformers"]) == 0
    assert (out / "modules.json").is_file() and not (out / "left-over").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    assert run(["export", checkpoint, str(theirs)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    assert run(["export", checkpoint, str(theirs / "thesis.txt")]) == 2


@pytest.fixture
def files_end_at_100_kb():
    """Make the system refuse longer files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def earlier(tmp_path) -> Path:
    out = tmp_path / "out"
    assert run(["export", "tiny", str(out)]) == 0
    return out


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_reported_and_the_earlier_export_is_kept(
    kind, checkpoints, earlier, files_end_at_100_kb, capsys
):
    before = sorted(path.name for path in earlier.iterdir())
    capsys.readouterr()
    assert run(["export", str(checkpoints["dual_lora"]), str(earlier), "--format", kind]) == 4
    assert f"error: cannot write {earlier}" in capsys.readouterr().err
    assert sorted(path.name for path in earlier.iterdir()) == before
    assert not list(earlier.parent.glob(".*part"))


def test_a_missing_package_is_named_with_its_installation(
    checkpoints, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    given = ["export", str(checkpoints["full"]), str(tmp_path / "out"), "--format", "onnx"]
    assert run(given) == 2
    printed = capsys.readouterr().err
    assert "needs onnxruntime" in printed and "clipft[onnx]" in printed
    assert not (tmp_path / "out").exists()


def test_unknown_models_and_formats_are_refused(tmp_path, capsys):
    assert run(["export", "tiny", str(tmp_path / "out"), "--format", "onyx"]) == 2
    assert "did you mean onnx" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 5
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.slow
def test_siglip_is_exported_with_the_padding_that_it_needs(tmp_path, capsys):
    import onnxruntime
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    from tests.models.checkpoints import TEXTS, write_siglip

    (tmp_path / "base").mkdir()
    base = str(write_siglip(tmp_path / "base"))
    assert run(["export", base, str(tmp_path / "all"), "--format", "all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["folders"]) == set(FORMATS) - {"peft", "open_clip"}
    assert result["onnx_check"]["image_difference"] < 1e-4
    loaded = opened(base)
    texts = list(embed_texts(loaded.loaded, TEXTS))
    clip = AutoModel.from_pretrained(tmp_path / "all" / "transformers")
    assert clip.logit_bias.item() == pytest.approx(-12.9, abs=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "all" / "onnx" / "onnx" / "text_model.onnx")
    for text, own in zip(TEXTS, texts, strict=True):
        ids = loaded.loaded.base.inputs.tokenizer(text)["input_ids"]
        found = session.run(None, {"input_ids": np.array([ids], np.int64)})[0]
        assert_same(found, own[None])
    model = SentenceTransformer(str(tmp_path / "all" / "sentence-transformers"), device="cpu")
    assert_same(model.encode(TEXTS), torch.stack(texts))
