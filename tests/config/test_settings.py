import json
import os
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.config.fields import choices_of, range_of
from clipft.config.settings import Settings, fixed_on_resume
from clipft.config.settings_file import template
from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.runs.places import saved_settings


def load(flags=None, config=None, environ=None):
    return load_settings(flags or {}, config, environ or {})


def test_defaults_are_those_promised():
    promised = {
        "data_dir": Path("/tmp/furniture_data"),
        "s3_bucket": None,
        "s3_prefix": "data/train",
        "output_dir": Path("./checkpoints"),
        "mini_train": False,
        "scenario": "dual_lora",
        "epochs": 10,
        "effective_batch_size": 1024,
        "micro_batch_size": 0,
        "num_workers": None,
        "seed": 42,
        "lr": 1e-4,
        "wd": 0.1,
        "warmup_steps": 100,
        "grad_clip": 1.0,
        "augmentation": "simple",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "wandb_project": "clip-furniture-finetune",
        "enable_s3_checkpoints": False,
        "resume_from_checkpoint": False,
    }
    values = load().values.model_dump()
    assert {name: values[name] for name in promised} == promised


def test_sources_rank_flag_environment_file_profile_default(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("seed = 1\nepochs = 1\nwd = 0.5\n")
    loaded = load({"seed": "3"}, file, {"CLIPFT_SEED": "2", "CLIPFT_EPOCHS": "2"})
    assert (loaded.values.seed, loaded.values.epochs, loaded.values.wd) == (3, 2, 0.5)
    assert loaded.origins["seed"] == "flag"
    assert loaded.origins["epochs"] == "environment"
    assert loaded.origins["wd"] == f"file {file}"
    assert loaded.origins["lr"] == "default"


def test_the_scenario_brings_its_learning_rate_unless_one_is_given():
    assert load({"scenario": "linear_probe"}).values.lr == 1e-3
    assert load({"scenario": "linear_probe", "lr": "2e-4"}).values.lr == 2e-4


def test_mini_train_is_weaker_than_any_other_source():
    assert load({"mini_train": True}).values.epochs == 1
    assert load({"mini_train": True}, environ={"CLIPFT_EPOCHS": "3"}).values.epochs == 3


@given(
    lr=st.floats(1e-9, 10, allow_nan=False),
    seed=st.integers(0, 2**40),
    project=st.text(st.characters(codec="utf-8")),
)
def test_printed_settings_read_back_as_they_were(tmp_path_factory, lr, seed, project):
    loaded = load({"lr": lr, "seed": seed, "wandb_project": project, "scenario": "full"})
    file = tmp_path_factory.mktemp("toml") / "s.toml"
    file.write_text(loaded.to_toml(), encoding="utf-8")
    assert load(config=file).values == loaded.values


@pytest.mark.parametrize(
    ("flags", "toml", "environ", "message", "hint"),
    [
        ({"scenario": "dual_lara"}, "", {}, "--scenario 'dual_lara'", "clipft settings"),
        ({"augmentation": "simpel"}, "", {}, "(did you mean simple?)", ""),
        ({"epochs": "0"}, "", {}, "--epochs '0': must be at least 1", ""),
        ({}, "learning_rat = 1", {}, "unknown setting learning_rat", ""),
        ({}, "lora_rr = 1", {}, "unknown setting lora_rr", "did you mean lora_r?"),
        ({}, "", {"CLIPFT_EPOCS": "1"}, "CLIPFT_EPOCS", "did you mean CLIPFT_EPOCHS?"),
        ({}, "", {"CLIPFT_SEED": "x"}, "CLIPFT_SEED 'x': must be", ""),
        ({}, "not toml", {}, "is not valid TOML", ""),
    ],
)
def test_mistakes_are_named_where_they_were_made(tmp_path, flags, toml, environ, message, hint):
    file = tmp_path / "a.toml"
    file.write_text(toml)
    with pytest.raises(UsageError) as caught:
        load(flags, file, environ)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_all_mistakes_come_at_once():
    with pytest.raises(UsageError) as caught:
        load({"epochs": "0", "lr": "x"})
    assert "--epochs" in caught.value.message
    assert "--lr" in caught.value.message


def test_every_setting_says_what_it_is_and_whether_a_resumed_run_may_change_it():
    fixed = fixed_on_resume()
    assert {"lr", "scenario", "seed", "effective_batch_size"} <= set(fixed)
    assert not {"num_workers", "micro_batch_size", "data_dir"} & set(fixed)
    assert all(field.description for field in Settings.model_fields.values())


def test_the_template_sets_nothing_and_uncommented_the_defaults(tmp_path):
    text = template()
    file = tmp_path / "t.toml"
    file.write_text(text)
    assert set(load(config=file).origins.values()) == {"default"}
    lines = [line[1:] for line in text.splitlines() if line.startswith("#") and line[1:2] != " "]
    file.write_text("\n".join(line for line in lines if "=  # not set" not in line))
    assert load(config=file).values == Settings()
    assert {line.partition(" ")[0] for line in lines} == set(Settings.model_fields)


def test_the_schema_takes_what_clipft_prints_and_refuses_what_it_refuses():
    schema = Settings.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    printed = tomllib.loads(load().to_toml())
    jsonschema.validate(printed, schema)
    for wrong in ({"epochs": 0}, {"augmentation": "much"}, {"learning_rate": 1}, {"max_bad": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(printed | wrong, schema)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("epochs", "at least 1"),
        ("s3_requests", "1 to 256"),
        ("lora_alpha", "above 0"),
        ("lora_dropout", "0 to below 1"),
        ("layer_decay", "above 0 to 1"),
        ("caption", ""),
    ],
)
def test_ranges_are_those_of_the_model(name, words):
    assert range_of(Settings.model_fields[name]) == words


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_settings_file(tmp_path, encoding):
    file = tmp_path / "bom.toml"
    file.write_text("epochs = 7\r\n", encoding=encoding, newline="")
    assert load(config=file).values.epochs == 7


def test_a_settings_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "latin.toml"
    file.write_bytes(b"data_dir = 'K\xfcche'\n")
    with pytest.raises(UsageError, match=r"latin.toml: not UTF-8 text"):
        load(config=file)


@pytest.mark.parametrize("name", ["data_dir", "output_dir", "caption"])
def test_names_that_are_not_utf_8_are_refused(name):
    value = os.fsdecode(b"K\xfcche")
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}.*not UTF-8"):
        load({name: value})
    with pytest.raises(UsageError, match=f"CLIPFT_{name.upper()}.*not UTF-8"):
        load(environ={f"CLIPFT_{name.upper()}": value})


def test_a_renamed_setting_is_still_accepted_under_its_former_name(tmp_path, capsys):
    """As a flag, a variable, a TOML key, a Python keyword, and in a saved checkpoint."""
    file = tmp_path / "old.toml"
    file.write_text("s3_patience = 7\n")
    assert load({"s3_patience": "7"}).values.s3_retry_timeout == 7
    assert load(config=file).values.s3_retry_timeout == 7
    from_environment = load(environ={"CLIPFT_S3_PATIENCE": "7"})
    assert from_environment.values.s3_retry_timeout == 7
    assert from_environment.origins["s3_retry_timeout"] == "environment"
    assert Settings(s3_patience=7).s3_retry_timeout == 7
    assert saved_settings({"settings": {"s3_patience": 7}}, load(), ()).s3_retry_timeout == 7
    assert run(["settings", "--s3-patience", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["s3_retry_timeout"] == 7
    assert run(["train", "--help"]) == 0
    assert "s3-patience" not in capsys.readouterr().out


def test_the_current_name_of_a_renamed_setting_wins():
    loaded = load({"s3_patience": "1", "s3_retry_timeout": "2"})
    assert loaded.values.s3_retry_timeout == 2


def test_every_choice_is_explained_in_the_description():
    for name, field in Settings.model_fields.items():
        for choice in choices_of(field):
            assert choice in str(field.description), f"{name} does not explain {choice}"


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_variable_is_as_good_as_none(empty):
    names = ("CLIPFT_LR", "CLIPFT_DATA_DIR", "CLIPFT_S3_BUCKET", "CLIPFT_NO_SUCH_SETTING")
    assert load(environ=dict.fromkeys(names, empty)).values == Settings()
    assert set(load(environ=dict.fromkeys(names, empty)).origins.values()) == {"default"}


@pytest.mark.parametrize("source", ["flags", "toml", "environ"])
@pytest.mark.parametrize("name", ["data_dir", "output_dir", "model"])
def test_the_home_folder_is_expanded_wherever_a_path_comes_from(
    name, source, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "a.toml"
    file.write_text(f'{name} = "~/x"' if source == "toml" else "")
    flags = {name: "~/x"} if source == "flags" else {}
    environ = {f"CLIPFT_{name.upper()}": "~/x"} if source == "environ" else {}
    loaded = load(flags, file, environ)
    assert str(getattr(loaded.values, name)) == "/home/me/x"


def test_only_the_home_folder_is_expanded():
    """Not a tilde elsewhere, nor one in a text, nor the home of a user that does not exist."""
    values = {"data_dir": "a/~", "caption": "~/x", "output_dir": "~nobody-at-all/x"}
    loaded = load(values).values
    assert (str(loaded.data_dir), loaded.caption) == ("a/~", "~/x")
    assert str(loaded.output_dir) == "~nobody-at-all/x"


def test_arguments_and_the_settings_file_may_be_below_the_home_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text("lr = 0.5\n")
    assert run(["settings", "--config=~/a.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["lr"] == 0.5
    monkeypatch.setenv("CLIPFT_CONFIG", "~/a.toml")
    assert run(["settings", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["lr"] == 0.5
    monkeypatch.setenv("CLIPFT_CONFIG", "")
    assert run(["settings", "--json"]) == 0
    capsys.readouterr()
    assert run(["report", "~/no-run"]) == 2
    assert f"no run in {tmp_path}/no-run" in capsys.readouterr().err
    assert not (tmp_path / "no-run").exists()
