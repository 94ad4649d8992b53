"""CLIPs whose image tower open_clip runs: they embed, train and are exported like any CLIP."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipft.cli.app import run
from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import ModelError, UsageError
from clipft.models.open_clip.backed import positions_of
from clipft.models.open_clip.convert import converted_folder, read_report
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import adapt
from tests.conftest import write_shard
from tests.models.open_clip.folders import CONFIG, describe, write
from tests.models.open_clip.test_convert import assert_same, embeddings, ours
from tests.training import test_resume


def timm(name: str, size: int, text: dict | None = None, **vision: object) -> dict:
    vision_cfg = {"timm_model_name": name, "image_size": size, "timm_drop_path": 0.1, **vision}
    return {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": vision_cfg,
        "text_cfg": {**CONFIG["text_cfg"], **(text or {})},
    }


KINDS = {
    "transformer": timm("test_vit", 160, timm_pool="token", timm_proj=None),
    "batch norms": timm(
        "test_byobnet", 160, {"no_causal_mask": True}, timm_pool="avg", timm_proj=None
    ),
    "mlp": timm("test_convnext", 160, timm_pool="", timm_proj="mlp"),
}
"""timm's own test models: like PE, MobileCLIP and ConvNeXt, a thousandth of the size."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: f"local-dir:{write(parent / kind[:5], KINDS[kind])}" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_open_clips_tower_embeds_as_it_does_there(kind, folders):
    base = load_pretrained(folders[kind])
    assert read_report(converted_folder(folders[kind])).difference < 2e-6
    used, _, tensors = base.conversion.split()[:3]
    assert used == tensors
    assert_same(ours(folders[kind]), embeddings(folders[kind]))


def train(model: str, catalogue: Path, out: Path, scenario: str, *more: str) -> list[dict]:
    given = [
        *("train", "--model", model, "--scenario", scenario, "--data-dir", str(catalogue)),
        *("--output-dir", str(out), "--epochs", "1", "--effective-batch-size", "24"),
        *("--num-workers", "0", "--precision", "fp32", "--lora-r", "4", "--stop-on", "never"),
        *("--max-train-pairs", "48", "--max-val-pairs", "16", *more),
    ]
    assert run(given) == 0
    (metrics,) = out.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scenario"), [("batch norms", "full"), ("transformer", "dual_lora")]
)
def test_the_loss_is_that_of_the_effective_batch(kind, scenario, folders, catalogue, tmp_path):
    """However the pairs are cut into chunks: with batch norms as well as with dropout."""
    losses = []
    for micro in ("24", "5"):
        more = ("--micro-batch-size", micro, "--lora-dropout", "0.2", "--lr", "1e-3")
        lines = train(folders[kind], catalogue, tmp_path / micro, scenario, *more)
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_tower_is_made_by_timm_alone_and_not_taken_from_the_hub(tmp_path):
    write(tmp_path, CONFIG)
    describe(tmp_path, timm("hf-hub:some/model", 160))
    with pytest.raises(ModelError, match="its image tower is timm's hf-hub:some/model"):
        load_pretrained(f"local-dir:{tmp_path}")


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(folders, tmp_path, monkeypatch):
    """Batch norms included, whose statistics no checkpoint holds."""
    write_shard(tmp_path / "data" / "train" / "00000.tar", range(26))
    write_shard(tmp_path / "data" / "val" / "00000.tar", range(1000, 1008))
    given = ("--model", folders["batch norms"], "--scenario", "full", "--lr", "1e-3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(test_resume, "NAME", "full_checkpoint.pt")
    assert test_resume.train(tmp_path / "data", whole, *given) == 0
    test_resume.kill_after(3, tmp_path / "data", parts, monkeypatch, *given)
    assert test_resume.resume(parts) == 0
    assert test_resume.same_bits(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear_probe", "text_lora", "full"])
def test_scenarios_train_what_they_name(kind, name, folders):
    base, scenario = load_pretrained(folders[kind]), SCENARIOS[name]
    model = adapt(base, scenario, load_settings({}, environ={}).values).train()
    side = base.inputs.image_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    ids = torch.tensor([[49406, 320, 49407], [49406, 530, 49407]])
    images, texts = model(pixels, ids)
    (images @ texts.T).diagonal().sum().backward()
    parts = {model.part_of(name) for name, p in model.trainable() if p.grad is not None}
    expected = {
        "linear_probe": {"visual_projection", "text_projection"},
        "text_lora": {"text", "text_projection"},
        "full": {"vision", "text", "visual_projection", "text_projection"},
    }
    assert parts == expected[name]
    statistics = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(statistics) == (kind == "batch norms") and not any(m.training for m in statistics)


def test_adapters_are_where_rows_have_positions(folders):
    base = load_pretrained(folders["transformer"])
    found = positions_of(base.model.vision_model)
    layers = len(base.model.vision_model.tower.trunk.blocks)
    assert len(found) == 4 * layers and set(found.values()) == {101}
    settings = load_settings({"lora_targets": "all"}, environ={}).values
    model = adapt(base, SCENARIOS["vision_lora"], settings)
    adapted = [name for name, _ in model.trainable() if "lora_A" in name]
    assert len(adapted) == 4 * layers and all("vision_model.tower" in name for name in adapted)
    assert model.image_positions == 101
    assert [model.layers_above(name) for name in adapted[::4]] == list(range(layers, 0, -1))
    with pytest.raises(ModelError, match="cannot adapt"):
        adapt(
            load_pretrained(folders["mlp"]),
            SCENARIOS["vision_lora"],
            load_settings({}, environ={}).values,
        )


@pytest.mark.slow
def test_a_trained_one_is_exported_for_open_clip_alone(folders, catalogue, tmp_path, capsys):
    run_folder, out = tmp_path / "run", tmp_path / "out"
    train(folders["transformer"], catalogue, run_folder, "dual_lora", "--lr", "1e-2")
    (checkpoint,) = run_folder.rglob("best.pt")
    assert run(["export", str(checkpoint), str(out), "--format", "transformers"]) == 2
    assert "transformers has no model like this one" in capsys.readouterr().err
    assert run(["export", str(checkpoint), str(out), "--format", "open_clip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["open_clip_difference"] < 2e-6
    again = load_pretrained(f"local-dir:{out}")
    assert again.fingerprint() != load_pretrained(folders["transformer"]).fingerprint()
    assert_same(ours(f"local-dir:{out}"), embeddings(f"local-dir:{out}"))


def test_its_weights_are_not_sharded(folders):
    from clipft.training.step.fsdp import hold_weights

    settings = load_settings({"shard_weights": "true", "scenario": "full"}, environ={}).values
    loaded = SimpleNamespace(base=load_pretrained(folders["mlp"]))
    with pytest.raises(UsageError, match="because open_clip runs its image tower"):
        hold_weights(settings, loaded, SimpleNamespace(world_size=2), print)


def test_without_open_clip_it_is_refused(folders, monkeypatch):
    monkeypatch.setattr("clipft.models.open_clip.backed.open_clip_installed", lambda: False)
    with pytest.raises(ModelError, match="needs open_clip, because its image tower is timm's"):
        load_pretrained(folders["mlp"])
