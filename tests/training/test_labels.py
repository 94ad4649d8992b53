"""A run that is trained on labels, from its prompts to its accuracies."""

import json
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.data.captions.template import CaptionTemplate
from clipft.distributed.collectives import Processes
from tests.conftest import write_shard
from tests.tiny_run import TINY
from tests.training.process_helpers import results
from tests.training.step.sharded_runs import Run

LABELED = ["--label-field", "type", "--label-prompts", "a photo of a {}. || {}, furniture"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    write_shard(folder / "train" / "00000.tar", range(48))
    write_shard(folder / "val" / "00000.tar", range(1000, 1024))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    more = ["--epochs", "2", "--shots", "4", "--lr", "1e-3"]
    where = ["--data-dir", str(data), "--output-dir", str(out)]
    assert run(["train", *TINY, *LABELED, *more, *where]) == 0
    return out / "dual_lora"


def test_a_run_measures_accuracy_after_each_epoch(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if line["kind"] == "epoch"]
    assert len(accuracies) == 3 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["caption"] == "a photo of a {type}."
    found = evaluation["classification"]
    assert found["before"]["zero_shot"]["value"] == pytest.approx(accuracies[0])
    best = max(accuracies[1:])  # --stop-on is accuracy without being set
    assert found["after"]["value"] == pytest.approx(best)
    assert found["images"] == 24 and found["field"] == "type"
    assert set(found["before"]) == {"zero_shot", "linear", "tip_adapter"}
    for name, difference in found["difference"].items():
        expected = found["after"]["value"] - found["before"][name]["value"]
        assert difference["value"] == pytest.approx(expected)
        assert difference["low"] <= difference["value"] <= difference["high"]


def test_evaluate_and_the_report_show_the_accuracies(trained, data, capsys):
    assert run(["evaluate", str(trained), "--data-dir", str(data), "--num-workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "Accuracy by type: 24 images of" in shown and "pretrained, Tip-Adapter" in shown
    page = (trained / "report.html").read_text()
    assert "pretrained, linear classifier" in page


def test_other_captions_may_be_measured(trained, data, capsys):
    command = ["evaluate", str(trained), "--data-dir", str(data), "--caption", "{caption}"]
    assert run([*command, "--num-workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["evaluation"]
    assert found["caption"] == "{caption}" and "classification" not in found


def test_labels_become_captions():
    settings = load_settings({"label_prompts": "a [{}] {{}}. || {}", "label_field": "kind"}).values
    template = CaptionTemplate.of(settings)
    assert template.captions(b"", b'{"kind": "sofa"}') == ["a [sofa] {sofa}.", "sofa"]
    assert (settings.positives, settings.stop_on) == ("label", "accuracy")
    chosen = load_settings({"label_prompts": "general", "positives": "pair", "stop_on": "loss"})
    assert (chosen.values.positives, chosen.values.stop_on) == ("pair", "loss")


def test_a_file_of_prompts_is_kept_in_the_settings(tmp_path):
    (tmp_path / "prompts.txt").write_text("a {}\n\n the {} \n")
    settings = load_settings({"label_prompts": str(tmp_path / "prompts.txt")}).values
    assert settings.label_prompts == "a {} || the {}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--label-prompts", "generel"], "--label-prompts generel: there is no such set"),
        (["--label-prompts", "a {} || the"], "there is no {} in 'the'"),
        (["--label-prompts", "general", "--caption", "{name}"], "cannot be used together"),
        (["--label-prompts", "general", "--label-field", "typ"], "no pair has a field 'typ'"),
        (["--stop-on", "accuracy"], "--stop-on accuracy needs --label-prompts"),
        (["--shots", "4", "--label-field", "typ"], "no pair has a field 'typ'"),
        (["--shots", "4", "--stream"], "--shots cannot be used with --stream"),
    ],
)
def test_mistakes_are_refused(given, message, data, tmp_path, capsys):
    where = ["--data-dir", str(data), "--output-dir", str(tmp_path / "out")]
    assert run(["train", *TINY, *given, *where]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "hint:" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_prompts_of_several_kinds_are_refused_in_one_sentence():
    settings = load_settings({"label_prompts": "general", "fields": "name:1"}).values
    with pytest.raises(UsageError, match="--fields and --label-prompts cannot be used together"):
        CaptionTemplate.of(settings)


def test_two_processes_train_on_the_same_labels(data):
    """The pairs of each label, their prompts and their positives are those of one process."""
    given = {"label_field": "type", "label_prompts": "a {} || {}", "shots": 3, "epochs": 1}
    given |= {"data_dir": str(data), "scenario": "dual_lora"}
    body = f"""
    from tests.training.step.sharded_runs import Run
    run = Run.of({given!r}, processes)
    result = [len(run.setup.train), *run.train(), run.validation_loss()]
"""
    run = Run.of(given, Processes())
    alone = [len(run.setup.train), *run.train(), run.validation_loss()]
    first, second = results(body)
    assert first == second == pytest.approx(alone, rel=1e-4)
