"""The runs that an ablation plans."""

from pathlib import Path

import pytest

from clipft.ablation.grid import Grid, check_same_ablation, plan_runs
from clipft.config.scenarios import SCENARIOS
from clipft.core.errors import UsageError

OUT = Path("/nowhere/out")


def planned(scenarios, seeds, varied, base=None):
    return plan_runs(Grid(scenarios, seeds, varied), base or {}, OUT)


def test_every_combination_is_planned_once_seed_by_seed():
    runs = planned(["dual_lora", "full"], [1, 2], {"lr": [1e-4, 1e-3]})
    assert [(run.variant, run.seed) for run in runs] == [
        (f"{scenario} lr={lr}", seed)
        for seed in (1, 2)
        for scenario in ("dual_lora", "full")
        for lr in ("0.0001", "0.001")
    ]
    assert len({run.home for run in runs}) == 8
    assert all(run.settings.values.seed == run.seed for run in runs)


def test_settings_that_a_scenario_does_not_use_make_no_runs():
    varied = {"lr": ["1e-4", "1e-3"], "lora_r": [8, 16]}
    runs = planned(list(SCENARIOS), [1, 2, 3], varied)
    counts = dict.fromkeys(SCENARIOS, 0)
    for run in runs:
        counts[run.settings.values.scenario] += 1
    assert counts == {
        "zero_shot": 1,
        "linear_probe": 6,
        "dual_lora": 12,
        "vision_lora": 12,
        "text_lora": 12,
        "full": 6,
    }


def test_a_scenarios_own_default_applies_unless_the_user_overrides_it():
    alone = planned(["linear_probe", "full"], [1], {})
    assert [run.settings.values.lr for run in alone] == [1e-3, 1e-5]
    overridden = planned(["linear_probe", "full"], [1], {}, {"lr": 5e-4})
    assert [run.settings.values.lr for run in overridden] == [5e-4, 5e-4]


def test_values_that_are_not_valid_file_names_get_distinct_folders():
    runs = planned(["full"], [1], {"caption": ["{a}/{b}", "{a}:{b}"]})
    first, second = (run.home for run in runs)
    assert first != second
    assert first.parent.parent == second.parent.parent == OUT


@pytest.mark.parametrize(
    "scenarios, varied, message",
    [
        (["dual_lore"], {}, "did you mean dual_lora"),
        (["full"], {"seed": [1]}, "seed cannot be varied"),
        (["full"], {"lr": ["fast"]}, "must be a number"),
        (["full"], {"lr": []}, "a value for each setting"),
        ([], {}, "needs a scenario"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(scenarios, varied, message):
    with pytest.raises(UsageError, match=message):
        planned(scenarios, [1], varied)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    grid = Grid(["full"], [1], {})
    (run,) = plan_runs(grid, {"epochs": 2}, tmp_path)
    run.home.mkdir(parents=True)
    run.config.write_text(run.settings.to_toml())
    check_same_ablation(plan_runs(grid, {"epochs": 2, "num_workers": 7}, tmp_path))
    with pytest.raises(UsageError, match="epochs 2 -> 3"):
        check_same_ablation(plan_runs(grid, {"epochs": 3}, tmp_path))
