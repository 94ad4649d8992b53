"""Run every seed, and everything that the fuzzers ever found, once."""

from pathlib import Path

import pytest

from tests.fuzz import checkpoint_target, targets

TARGETS = {**targets.TARGETS, **checkpoint_target.TARGETS}
SEEDS = sorted((Path(__file__).parent / "seeds").glob("*/*"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_answered_rightly_or_refused(seed):
    TARGETS[seed.parent.name](seed.read_bytes())


def test_each_target_has_seeds():
    assert {seed.parent.name for seed in SEEDS} == set(TARGETS)
