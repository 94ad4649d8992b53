"""Cached features make a run faster and change nothing else."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.core.cache import cache_folder
from clipft.core.common import silent
from clipft.data.loader import training_batches
from clipft.data.order import Position
from clipft.distributed.collectives import ALONE
from clipft.embedding import feature_cache
from clipft.embedding.feature_cache import CacheForecast, image_features
from clipft.embedding.load import load_model
from clipft.training.loop import fit
from clipft.training.prepare import prepare
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState
from tests.conftest import write_shard


def settings_of(data, **given) -> Settings:
    flags = {
        "model": "tiny",
        "data_dir": str(data),
        "effective_batch_size": 40,
        "micro_batch_size": 16,
        "num_workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "epochs": 2,
        "lora_dropout": 0.1,
        **given,
    }
    return load_settings(flags, environ={}).values


def setup_of(data, **given) -> RunSetup:
    return prepare(settings_of(data, **given), lambda note: None, ALONE)


def trained(setup: RunSetup):
    state = TrainState(setup.loaded.model, setup.make_optimizer(), setup.epoch_plan.steps)
    how, plan = setup.encoding.preprocessing, setup.epoch_plan
    batches = training_batches(setup.train, how, plan, Position(), 2, setup.loader_options)
    return list(fit(state, batches, setup.make_accumulation(state.optimizer, print)))


CASES = [
    ("linear_probe", "none", {"images", "texts"}),
    ("linear_probe", "simple", {"texts"}),
    ("vision_lora", "none", {"texts"}),
    ("text_lora", "none", {"images"}),
    ("dual_lora", "none", set()),
]


@pytest.mark.parametrize(("scenario", "augmentation", "kept"), CASES)
def test_training_gives_the_same_with_and_without_cached_features(
    scenario, augmentation, kept, catalogue
):
    given = {"scenario": scenario, "augmentation": augmentation}
    live = setup_of(catalogue, feature_cache=False, **given)
    assert not (cache_folder() / "features").exists()
    cached = setup_of(catalogue, **given)
    made = [path.name.split("-")[0] for path in (cache_folder() / "features").glob("*")]
    assert made.count("images") == ("images" in kept) + (
        not live.loaded.model.vision_tower_trainable
    )
    assert made.count("texts") == ("texts" in kept) + (not live.loaded.model.text_tower_trainable)
    for ours, expected in zip(trained(cached), trained(live), strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-5)
    expected = live.loaded.model.trainable_state()
    for name, weight in cached.loaded.model.trainable_state().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


def test_bad_images_are_skipped_with_the_same_reasons(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", range(40), bad=[3, 17])
    write_shard(tmp_path / "val" / "0.tar", range(1000, 1010))
    given = {"scenario": "linear_probe", "augmentation": "none", "max_bad": 0.2}
    live, cached = setup_of(tmp_path, feature_cache=False, **given), setup_of(tmp_path, **given)
    for ours, expected in zip(trained(cached), trained(live), strict=True):
        assert ours.pairs == expected.pairs == 38
        assert [s["key"] for s in ours.skipped] == [s["key"] for s in expected.skipped]
        assert [s["reason"] for s in ours.skipped] == [s["reason"] for s in expected.skipped]


def written_features() -> set[tuple[str, int]]:
    """Return the feature files in the cache, each with the time at which it was written."""
    files = (cache_folder() / "features").glob("*/values")
    return {(str(path), path.stat().st_mtime_ns) for path in files}


def test_features_are_computed_once_until_the_shards_change(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", range(40))
    write_shard(tmp_path / "val" / "0.tar", range(1000, 1010))
    given = {"scenario": "linear_probe", "augmentation": "none"}
    setup_of(tmp_path, **given)
    made = written_features()
    assert len(made) == 4  # images and texts, of train and of val
    setup_of(tmp_path, **given)
    assert written_features() == made
    write_shard(tmp_path / "train" / "0.tar", range(50, 90))
    setup_of(tmp_path, **given)
    assert len(written_features() - made) == 2  # those of train


def test_features_are_computed_again_where_anything_that_decides_their_bits_changed(
    catalogue, monkeypatch
):
    """Versions, hardware, threads and the norms' epsilon are in the key, beside the weights."""
    loaded = load_model(settings_of(catalogue, scenario="linear_probe"))

    def keys() -> tuple[str, ...]:
        return tuple(feature_cache._computed_with(loaded))

    seen, real = {keys()}, feature_cache.version

    def changed() -> None:
        assert keys() not in seen
        seen.add(keys())

    for package in ("torch", "torchvision", "transformers", "pillow"):
        with monkeypatch.context() as patch:
            other = lambda name, p=package: "0.0" if name == p else real(name)  # noqa: E731
            patch.setattr(feature_cache, "version", other)
            changed()
    for tower in (loaded.base.model.config.vision_config, loaded.base.model.config.text_config):
        tower.layer_norm_eps *= 2
        changed()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    changed()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    changed()
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        object.__setattr__(loaded.precision, "device", torch.device("cuda"))
        changed()


@pytest.mark.parametrize("part", ["version", "instruction_set"])
def test_features_of_another_version_or_machine_are_not_used(part, catalogue, monkeypatch):
    given = {"scenario": "linear_probe", "augmentation": "none"}
    setup_of(catalogue, **given)
    made = written_features()
    monkeypatch.setattr(feature_cache, part, lambda asked: "another")
    setup_of(catalogue, **given)
    assert len(written_features() - made) == 4


def image_rows(setup: RunSetup) -> torch.Tensor:
    features = image_features(setup.loaded, setup.train, setup.loader_options, silent)
    return features.rows(np.arange(96, dtype=np.uint64))


def test_a_forecast_computes_a_sample_and_says_what_all_would_take(catalogue, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SAMPLE", 64)
    given = {"scenario": "linear_probe", "augmentation": "none"}
    cache = CacheForecast()
    settings = settings_of(catalogue, **given)
    sampled = prepare(settings, lambda note: None, ALONE, cache=cache)
    in_full = {Path(path).parent.name for path, _ in written_features()}
    assert len(in_full) == 2, "those of the 40 validation pairs alone"
    assert {name.split("-")[0] for name in cache.seconds} == {"images", "texts"}
    assert all(seconds > 0 for seconds in cache.seconds.values())
    assert len(trained(sampled)) == 6, "steps can be measured"
    shown = image_rows(setup_of(catalogue, **given))
    headers = 2 * 128
    for name, size in cache.bytes.items():
        folder = cache_folder() / "features" / name
        assert name not in in_full
        arrays = [folder / "values", folder / "keys.npy", folder / "places.npy"]
        assert sum(path.stat().st_size for path in arrays) == size + headers
    loaded, options = sampled.loaded, sampled.loader_options
    again = image_features(loaded, sampled.train, options, silent, CacheForecast())
    numbers = np.arange(96, dtype=np.uint64)
    assert torch.equal(again.rows(numbers), shown), "what is cached is used"


def test_a_broken_cache_is_computed_again(catalogue):
    given = {"scenario": "linear_probe", "augmentation": "none"}
    expected = image_rows(setup_of(catalogue, **given))
    for path in (cache_folder() / "features").glob("images-*/values"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(image_rows(setup_of(catalogue, **given)), expected)


def test_both_towers_run_if_the_cache_cannot_be_written(catalogue, monkeypatch, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("CLIPFT_CACHE", str(blocked))
    notes = []
    settings = load_settings(
        {"model": "tiny", "data_dir": str(catalogue), "scenario": "linear_probe"}, environ={}
    ).values.model_copy(update={"micro_batch_size": 16, "num_workers": 0})
    setup = prepare(settings, notes.append, ALONE)
    assert setup.encoding.preprocessing.read_images
    assert any("features cannot be cached" in note for note in notes)


IN_A_PROCESS = """
import json, sys
from tests.embedding.test_feature_cache import figures
print(json.dumps(figures(*sys.argv[1:])))
"""


def figures(catalogue: str, cache: str) -> list[list[object]]:
    """Losses, norms and weights of runs that compute their features into folders of ``cache``."""
    found = []
    for scenario in ("linear_probe", "vision_lora"):
        os.environ["CLIPFT_CACHE"] = f"{cache}/{scenario}"
        setup = setup_of(catalogue, scenario=scenario, augmentation="none", epochs=2)
        losses = [[step.loss, step.grad_norm] for step in trained(setup)]
        weights = sorted(setup.loaded.model.trainable_state().items())
        content = b"".join(weight.numpy().tobytes() for _, weight in weights)
        found.append([scenario, hashlib.sha256(content).hexdigest(), losses])
    return found


@pytest.mark.slow
def test_runs_that_compute_their_own_features_are_equal_bit_for_bit(catalogue, tmp_path):
    """In each process the strings of a set have another order."""
    ours = figures(str(catalogue), str(tmp_path / "ours"))
    command = [sys.executable, "-c", IN_A_PROCESS, str(catalogue), str(tmp_path / "theirs")]
    another_order = {**os.environ, "PYTHONHASHSEED": "1"}
    assert json.loads(subprocess.check_output(command, env=another_order, text=True)) == ours
    values = [path.read_bytes() for path in sorted(tmp_path.glob("*/*/features/texts-*/values"))]
    assert len(values) == 8  # those of train and val, in two scenarios and two processes
    assert len(set(values)) == 2


def test_a_run_in_the_same_process_repeats_itself_bit_for_bit(catalogue):
    given = {"scenario": "linear_probe", "augmentation": "none"}
    runs = [trained(setup_of(catalogue, **given)) for _ in range(3)]
    assert len({tuple((step.loss, step.grad_norm) for step in steps) for steps in runs}) == 1
