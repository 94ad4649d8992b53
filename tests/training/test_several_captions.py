"""Training on pairs with several captions: the draw, the cache, and an exact resume."""

import json
from collections import Counter
from pathlib import Path

import pytest

from clipft.config.settings import Settings
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from clipft.embedding.encoding import training_preprocessing
from clipft.models.pretrained import load_inputs
from tests.e2e.test_train import assert_same_run
from tests.several_captions import write_several
from tests.training.test_resume import kill_after, resume, train

COUNTS = (5, 1, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_several(folder / "train" / "00000.tar", range(26), COUNTS)
    write_several(folder / "val" / "00000.tar", range(1000, 1012), (5,))
    return folder


def drawn(data: Path, workers: int, epochs: int, start: Position | None = None, seed: int = 42):
    """Return {(epoch, pair): ids} of the captions that training draws."""
    settings, pairs = Settings(model="tiny", data_dir=data, seed=seed), open_pairs(data / "train")
    how = training_preprocessing(load_inputs("tiny"), pairs, settings, print)
    plan, found = EpochPlan(len(pairs), 12, 5, seed), {}
    start = start or Position()
    for step in training_batches(pairs, how, plan, start, epochs, LoaderOptions(workers)):
        for batch in step.micro_batches:
            for number, ids in zip(batch.numbers, batch.input_ids.tolist(), strict=True):
                kept = ids[: ids.index(how.captions.pad_token_id) + 1]
                found[step.epoch, number] = kept
    return found


def test_the_draw_follows_from_seed_epoch_and_pair_alone(data):
    alone = drawn(data, 0, 4)
    assert drawn(data, 2, 4) == alone
    later = drawn(data, 0, 4, Position(2, 1))
    assert later and all(alone[place] == ids for place, ids in later.items())
    assert drawn(data, 0, 4, seed=43) != alone


def test_every_caption_is_drawn_about_equally_often(data):
    pairs = open_pairs(data / "train")
    settings = Settings(model="tiny", data_dir=data)
    captions = training_preprocessing(load_inputs("tiny"), pairs, settings, print).captions
    for number, count in ((3, 5), (4, 1), (5, 3)):
        counts = Counter(tuple(captions.ids(pairs[number], epoch)) for epoch in range(150))
        assert len(counts) == count
        assert min(counts.values()) > 150 / count / 2


@pytest.mark.parametrize("scenario", ["dual_lora", "linear_probe"])
def test_a_killed_run_goes_on_with_the_same_bits(data, tmp_path, monkeypatch, scenario):
    """A frozen text tower takes its captions from the cache."""
    more = ("--scenario", scenario, "--epochs", "2")
    assert train(data, tmp_path / "whole", *more) == 0
    name = f"{scenario}_checkpoint.pt"
    monkeypatch.setattr("tests.training.test_resume.NAME", name)
    kill_after(3, data, tmp_path / "killed", monkeypatch, *more, "--num-workers", "2")
    assert resume(tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", scenario)
    evaluation = json.loads((tmp_path / "whole" / scenario / "evaluation.json").read_text())
    assert (evaluation["before"]["pairs"], evaluation["before"]["captions"]) == (12, 60)
