"""clipft's own steps on a CUDA card that is not there (see ``fake_card``).

A step that mixes devices fails here, as does one that waits for the card more often than it must,
gives attention ever new shapes, or has all images of a step on the card at once.
"""

import json
import shutil
from itertools import product

import pytest

from tests.gpu.fake_card import build

SCENARIOS = ("linear_probe", "dual_lora", "vision_lora", "text_lora", "full")
READS_PER_STEP = 2
"""Loss and norm, read together: a list of two values is one copy from a real card."""
MOST_SHAPES = 16
LONGEST = [30, 77, 9, 52, 21, 12, 64]
"""The tokens of the longest caption in each of some steps."""


def table() -> dict[str, dict[str, object]]:
    rows = dict[str, dict[str, object]]()
    ways = [(a, memory) for a in ("exact", "local") for memory in (70, 0)]
    for i, (scenario, precision) in enumerate(product(SCENARIOS, ("bf16", "fp16", "fp32"))):
        usual = scenario == "dual_lora" and precision == "bf16"
        # Every way for the most usual run, and one after the other for the rest
        for way in ways if usual else ways[i % 4 : i % 4 + 1]:
            kept = "all graphs" if way[1] else "few graphs"
            rows[f"{scenario} {precision} {way[0]}, {kept}"] = {
                "scenario": scenario,
                "precision": precision,
                "accumulation": way[0],
                "graph_memory": way[1],
            }
    rows["checkpointing"] = {"gradient_checkpointing": True}
    rows["checkpointing full"] = {"gradient_checkpointing": True, "scenario": "full"}
    rows["DoRA"] = {"lora_dora": True}
    rows["sigmoid loss"] = {"loss": "siglip"}
    rows["adapters in all maps"] = {"lora_targets": "all"}
    rows["trained temperature"] = {"logit_scale": "trained"}
    rows["positives by caption"] = {"positives": "caption"}
    rows["positives by caption, masked"] = {"positives": "caption", "positives_mode": "mask"}
    rows["crop and flip on the card"] = {"augment_on": "device"}
    rows["many lengths"] = {
        "longest": LONGEST,
        "effective_batch_size": 22,
        "micro_batch_size": 8,
    }
    rows["ViT-B/32"] = {"model": "B/32"}
    sizes = {"effective_batch_size": 8, "micro_batch_size": 4}
    common = {"model": "tiny", "precision": "bf16", **sizes}
    return {name: {**common, **own} for name, own in rows.items()}


TABLE = table()


@pytest.fixture(scope="module")
def outcomes(fake_card, catalogue):
    """What happened in each row, all from one program: torch takes its time to start."""
    given = json.dumps(list(TABLE.items()))
    said = fake_card("tests.gpu.fake_card.steps", given, str(catalogue))
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("name", TABLE)
def test_a_step_runs_on_the_card(outcomes, name):
    assert not outcomes[name]["error"]
    assert outcomes[name]["applied"] and all(outcomes[name]["applied"])


@pytest.mark.parametrize("name", TABLE)
def test_a_step_waits_for_the_card_once(outcomes, name):
    """So captions were cut on the CPU, and nothing came back but loss and norm."""
    reads, steps = outcomes[name]["reads"], len(outcomes[name]["applied"])
    assert [place for place in reads if "optimizer.py" not in place] == []
    assert len(reads) == 1 and sum(reads.values()) <= READS_PER_STEP * steps


def test_graphs_that_are_kept_are_not_computed_twice(outcomes):
    def calls(accumulation: str, kept: str) -> int:
        row = outcomes[f"dual_lora bf16 {accumulation}, {kept} graphs"]
        return sum(calls for *_, calls in row["attention"])

    once = calls("exact", "all")
    # Each tower has two chunks, of which the first always keeps its graph
    assert calls("exact", "few") == once * 3 // 2
    assert calls("local", "few") == calls("local", "all") == once


def test_many_lengths_make_few_shapes(outcomes):
    calls = outcomes["many lengths"]["attention"]
    assert len({(rows, keys) for _, rows, _, keys, _ in calls}) <= MOST_SHAPES


def test_hopper_does_not_plan_each_shape_anew(outcomes):
    kernels = {kernel for row in TABLE for kernel, *_ in outcomes[row]["attention"]}
    assert "_scaled_dot_product_flash_attention" in kernels
    assert "_scaled_dot_product_cudnn_attention" not in kernels


@pytest.mark.parametrize("name", ["many lengths", "dual_lora bf16 exact, few graphs", "train"])
def test_images_are_on_the_card_a_few_chunks_at_a_time(outcomes, name):
    images, micro = outcomes[name]["images"], TABLE.get(name, {"micro_batch_size": 8})
    assert max(copy["rows"] for copy in images) == micro["micro_batch_size"]
    assert outcomes[name]["most_images"] <= 3 * micro["micro_batch_size"]


def test_a_run_copies_its_images_from_pinned_memory_on_a_stream_of_their_own(outcomes):
    assert not outcomes["train"]["error"]
    trained = outcomes["train"]["images"][:4]  # those of the validation follow
    assert sum(copy["rows"] for copy in trained) == 32
    assert all(copy["pinned"] for copy in trained)
    assert all(copy["stream"] for copy in trained)  # 0 is the stream that computes


def test_validation_stays_on_the_card_and_computes_no_gradients(outcomes):
    validated = outcomes["validate"]
    assert not validated["error"]
    assert [copy["rows"] for copy in validated["images"]] == [8, 8]  # micro-batches
    assert not [name for name in validated["operators"] if "backward" in name]
    assert any("ranking.py" in place for place in validated["reads"])  # ranks come from the card


def test_a_mix_of_devices_is_found(outcomes):
    assert "on the same device" in outcomes["mixed"]


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.CannotBuild, match="no C compiler"):
        build._build(tmp_path / "new")
