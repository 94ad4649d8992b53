"""The table and the verdict of an ablation, from the figures of its runs."""

import pytest

from clipft.ablation.page import FIGURES, ablation_page, ablation_rows
from clipft.ablation.summary import ablation_content


def figures(recall: float) -> dict:
    one = {"r@1": recall, "r@5": recall, "r@10": recall, "median_rank": 3.0, "mrr": 0.5}
    return {"text_to_image": one, "image_to_text": one, "pairs": 40}


def a_run(variant: str, seed: int, after: float | None, before: float = 0.2) -> dict:
    trains = variant != "zero_shot"
    epochs = [{"epoch": 0, "step": 0, "train_loss": None, "val_loss": 3.0}]
    epochs[0]["retrieval"] = figures(before)
    return {
        "variant": variant,
        "scenario": variant.split()[0],
        "varied": {},
        "seed": seed,
        "folder": f"{variant}/seed-{seed}/x",
        "state": "finished",
        "exit_code": None,
        "error": None,
        "hint": None,
        "before": figures(before),
        "after": None if after is None else figures(after),
        "best_epoch": 1,
        "steps": 3,
        "skipped_pairs": 0,
        "epochs": epochs,
        "evaluation": None,
        "plan": {"epochs": 3 if trains else 0, "trainable_parameters": 10 if trains else 0},
        "environment": {"torch": "2"},
        "seconds": 60.0,
        "peak_memory_bytes": 2**30,
    }


def failed(variant: str, seed: int) -> dict:
    kept = ("variant", "scenario", "varied", "seed", "folder")
    run = {k: v for k, v in a_run(variant, seed, 0.3).items() if k in kept}
    return {**run, "state": "failed", "exit_code": 6, "error": "<b>diverged", "hint": "lower --lr"}


def content_of(*runs: dict) -> dict:
    return ablation_content("./x", {"runs": runs, "settings": []})


def test_gain_is_measured_against_the_runs_own_pretrained_model():
    content = content_of(a_run("full", 1, 0.5, before=0.2), a_run("full", 2, 0.6, before=0.4))
    (variant,) = content["variants"]
    assert variant["gain"]["values"] == {"1": pytest.approx(0.3), "2": pytest.approx(0.2)}
    assert variant["gain"]["mean"] == pytest.approx(0.25)


def test_the_verdict_names_the_variants_that_the_seeds_cannot_separate():
    runs = [a_run("full", seed, recall) for seed, recall in ((1, 0.50), (2, 0.52), (3, 0.54))]
    runs += [a_run("dual_lora", seed, r) for seed, r in ((1, 0.51), (2, 0.50), (3, 0.53))]
    # Lower by the same amount for every seed: clearly worse, although the ranges overlap
    runs += [a_run("text_lora", seed, r) for seed, r in ((1, 0.49), (2, 0.51), (3, 0.53))]
    content = content_of(a_run("zero_shot", 1, None), *runs)
    assert content["verdict"].startswith(
        "full is best: mean recall rose from 20.0% to 52.0% (+32.0 points, 95% interval +27.0 to "
        "+37.0)."
    )
    assert content["verdict"].endswith(
        "With three seeds, dual_lora (-0.7 points, 95% interval -4.5 to +3.1) is statistically "
        "indistinguishable from it."
    )
    assert next(row[0] for row in ablation_rows(content, FIGURES)) == "full"


def test_among_many_variants_a_difference_must_be_larger_to_be_clear():
    close = {1: 0.490, 2: 0.486, 3: 0.480}
    runs = [a_run("full", seed, 0.5) for seed in (1, 2, 3)]
    runs += [a_run("text_lora", seed, recall) for seed, recall in close.items()]
    alone = content_of(*runs)
    assert "it is clearly better than all others; the next is text_lora" in alone["verdict"]
    others = ("dual_lora", "vision_lora", "linear_probe")
    runs += [a_run(name, seed, 0.4 + seed * 0.03) for name in others for seed in (1, 2, 3)]
    among = content_of(*runs)
    assert "statistically indistinguishable from it; the next is text_lora" in among["verdict"]
    to_best = {v["name"]: v["to_best"] for v in among["variants"]}["text_lora"]
    assert to_best["high"] < 0 and to_best["p"] < 0.05 < to_best["p_adjusted"]
    page = ablation_page(among)
    assert "adjusted by Holm" in page


def test_one_seed_separates_nothing():
    content = content_of(a_run("full", 1, 0.5), a_run("dual_lora", 1, 0.4))
    assert "One seed says nothing about the spread" in content["verdict"]


def test_the_verdict_says_if_there_is_no_gain():
    content = content_of(a_run("zero_shot", 1, None), a_run("full", 1, 0.1))
    assert content["verdict"] == (
        "No variant is better than the pretrained model, so use that: its mean recall is 20.0%."
    )


def test_a_variant_that_is_clearly_better_is_told_with_the_distance_of_the_next():
    runs = [a_run("full", seed, 0.5 + seed / 1000) for seed in (1, 2)]
    runs += [a_run("dual_lora", seed, 0.4 + seed / 1000) for seed in (1, 2)]
    content = content_of(a_run("zero_shot", 1, None), *runs)
    assert content["verdict"].endswith(
        "With two seeds, it is clearly better than all others; the next is dual_lora (-10.0 "
        "points, 95% interval -10.0 to -10.0)."
    )
    by_name = {variant["name"]: variant for variant in content["variants"]}
    assert by_name["full"]["to_best"] is None
    assert by_name["zero_shot"]["to_best"]["values"]["2"] == pytest.approx(-0.302)


def test_a_gain_that_the_seeds_do_not_confirm_is_no_clear_difference():
    content = content_of(a_run("full", 1, 0.21), a_run("full", 2, 0.3), a_run("full", 3, 0.18))
    assert content["verdict"].startswith(
        "No clear difference: with full, mean recall went from 20.0% to 23.0% (+3.0 points, 95%"
    )


def test_failed_runs_are_in_the_table_and_on_the_page():
    content = content_of(a_run("full", 1, 0.5), failed("full", 2), failed("linear_probe", 1))
    rows = {row[0]: row for row in ablation_rows(content, FIGURES)}
    assert rows["full"][1] == "1/2, 1 failed" and rows["linear_probe"][1] == "0/1, 1 failed"
    page = ablation_page(content)
    assert "&lt;b&gt;diverged" in page and "<b>diverged" not in page
    assert "Not all runs have finished" in page and "lower --lr" in page


def test_an_ablation_without_finished_runs_has_a_page():
    content = content_of(failed("full", 1))
    assert content["verdict"] == "No run has finished."
    assert "No run has finished." in ablation_page(content)


def test_the_test_pairs_choose_nothing_and_are_reported():
    runs = [a_run("full", seed, 0.5 + seed / 100) for seed in (1, 2)]
    runs += [a_run("dual_lora", seed, 0.3) for seed in (1, 2)]
    for run, recall in zip(runs, (0.4, 0.42, 0.9, 0.9), strict=True):
        run["test"] = {"before": figures(0.25), "after": figures(recall)}
    content = content_of(*runs)
    assert content["verdict"].startswith("full is best: mean recall rose from 20.0% to 51.5%")
    assert content["verdict"].endswith(
        "On the test pairs it reaches 41.0% (+16.0 points, 95% interval +3.3 to +28.7)."
    )
    rows = {row[0]: row for row in ablation_rows(content, FIGURES)}
    assert rows["full"][1 + FIGURES.index("test recall")] == "41.0 ± 1.4"
    assert "test recall" in ablation_page(content)
