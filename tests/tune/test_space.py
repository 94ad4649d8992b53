"""What a search may change."""

import pytest

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.data.captions.template import CaptionTemplate
from clipft.tune.space import SEARCHABLE, caption_choices, described, open_space
from tests.tune.stand_in import a_space

OPTUNA = pytest.importorskip("optuna")


class Pairs:
    """Metadata of a catalogue with a name, a color, an id and a long description."""

    def __init__(self, **extra):
        self.extra = extra

    def __len__(self):
        return 100

    def metadata(self, number):
        color = ("red", "dark blue")[number % 2]
        about = {
            "id": f"{number:05d}",
            "sku": f"MH{number:02d}",
            "name": f"chair {number}",
            "color": color,
        }
        return about | {"description": "A long text. " * 9, "url": "https://x.y/z"} | self.extra


def draws(space, count=40):
    """Random parameters of the space."""
    study = OPTUNA.create_study(sampler=OPTUNA.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_the_default_parameters_change_nothing():
    space = a_space(SEARCHABLE)
    assert space.changes(space.default()) == {}
    for parameters in draws(space):
        assert space.default() != parameters and space.changes(parameters)


def test_rates_are_drawn_around_those_of_the_best_trial():
    space = a_space(("lr", "lr_projections"))
    study = OPTUNA.create_study(sampler=OPTUNA.samplers.RandomSampler(seed=1))
    found = [space.suggest(study.ask(), best={"lr": 16.0}) for _ in range(40)]
    assert 4 <= min(each["lr"] for each in found) < 8
    assert 32 < max(each["lr"] for each in found) <= 64
    assert max(each["lr_projections"] for each in found) <= 4


def test_a_decay_of_averages_keeps_its_digits():
    space = a_space(ema=0.999)
    object.__setattr__(space, "names", (*space.names, "ema"))
    assert space.choices("ema") == [0.0, 0.9, 0.99, 0.999]
    assert space.changes(space.default()) == {}
    assert space.changes(space.default() | {"ema": 0.99}) == {"ema": 0.99}


def test_every_trial_has_valid_settings_and_only_those_that_its_scenario_uses():
    space = a_space(SEARCHABLE, ("{caption}", "{caption} || a photo of {caption}"))
    seen = set()
    for parameters in draws(space):
        changes = space.changes(parameters)
        settings = space.settings(changes).values
        scenario = SCENARIOS[settings.scenario]
        seen.add(scenario.name)
        assert not (not scenario.lora and any(name.startswith("lora_") for name in changes))
        assert scenario.full or "layer_decay" not in changes
        assert 3 <= settings.epochs <= 12
        assert settings.lora_alpha / settings.lora_r == 2
    assert seen == {name for name, scenario in SCENARIOS.items() if scenario.trains}


def test_rates_are_multiples_of_the_default_of_scenario_and_model(tmp_path):
    space = a_space(model=str(tmp_path))  # brings no rates of its own
    rates = {s: space.changes({"scenario": s, "lr": 2.0})["lr"] for s in ("full", "linear_probe")}
    assert rates == {"full": 2e-5, "linear_probe": 2e-3}
    both = a_space().changes({"scenario": "full", "lr": 2.0, "lr_projections": 4.0})
    assert (both["lr"], both["lr_projections"]) == (2e-3, 8e-3)
    assert "lr_projections" not in a_space().changes({"lr": 2.0, "lr_projections": 1.0})


def test_epochs_and_batch_are_set_together():
    """With one of them set, ``clipft train`` would choose the other anew."""
    space = a_space(epochs=6)
    assert space.changes({"effective_batch_size": 64})["effective_batch_size"] == 64
    open_space = a_space()
    object.__setattr__(open_space, "given", {"model": "tiny"})
    assert open_space.changes({"epochs": 9}) == {"epochs": 9, "effective_batch_size": 32}


@pytest.mark.parametrize(
    ("pairs", "batch", "sizes"),
    [
        *((500, 32, [16, 32, 64, 128]), (100, 32, [16, 32]), (20, 20, [20])),
        (10**6, 1024, [256, 512, 1024, 2048, 4096]),
    ],
)
def test_batches_are_around_the_default_and_fit_the_pairs(pairs, batch, sizes):
    space = a_space()
    values = space.base.values.model_copy(update={"effective_batch_size": batch})
    object.__setattr__(space, "pairs", pairs)
    object.__setattr__(space.base, "values", values)
    assert space.choices("effective_batch_size") == sizes


def test_groups_count_as_positives_only_where_there_are_any():
    assert a_space().choices("positives") == ["pair", "caption"]
    assert a_space(group_field="id").choices("positives") == ["pair", "caption", "group"]


def test_captions_come_from_short_fields_and_evaluation_keeps_its_own():
    base = load_settings({}, environ={}).values
    found = caption_choices(base, Pairs(material="wood, oiled"))
    assert found == (
        "{caption}",
        "{caption} || a photo of {caption}",
        "{caption} || {name}, {color}, {material}",
    )
    caption, metadata = b"a chair", b'{"name": "chair 1", "color": "red"}'
    for text in found:
        template = CaptionTemplate.parse(text).for_evaluation()
        assert template.captions(caption, metadata) == ["a chair"]


def test_captions_that_the_user_has_written_are_kept():
    own = load_settings({"caption": "{name} || {color}"}, environ={}).values
    assert caption_choices(own, Pairs()) == ("{name} || {color}",)
    weighted = load_settings({"fields": "name:1,color:0.5"}, environ={}).values
    assert caption_choices(weighted, Pairs()) == ("{caption}",)
    assert len(caption_choices(load_settings({}, environ={}).values, None)) == 2


def test_what_the_user_has_set_is_not_searched():
    given = {"lr": 1e-3, "scenario": "linear_probe"}
    space = open_space(load_settings(given, environ={}), given, (), 500, Pairs())
    assert not {"lr", "scenario", "lora_r"} & set(space.names)
    assert "wd" in space.names and "caption" in space.names


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ({}, ["lora_rank"], "did you mean lora_r"),
        ({}, ["data_dir"], "must be one of scenario, lr"),
        ({"lr": 1e-3}, ["lr"], "it is set to 0.001 as well"),
        ({"scenario": "linear_probe"}, ["lora_r"], "nothing to search"),
    ],
)
def test_mistakes_are_refused(given, wanted, message):
    with pytest.raises(UsageError, match=message):
        open_space(load_settings(given, environ={}), given, wanted, 500, None)


def test_changes_are_told_in_short():
    assert described({}) == "the defaults"
    assert described({"scenario": "full", "lr": 2e-5}) == "scenario=full lr=2e-05"
