"""The training loop."""

import weakref

from clipft.config.sources import load_settings
from clipft.data.shards.dataset import PairDataset
from clipft.distributed.collectives import ALONE
from clipft.training.loop import fit, step_batches
from clipft.training.prepare import prepare
from clipft.training.state import SkippedPairs, TrainState


def test_the_pairs_of_a_step_are_gone_before_the_next_ones_are_read(
    catalogue, monkeypatch, tmp_path
):
    """A step of 16,384 images of 224 pixels takes 2.4 GB: two must not be in memory at once."""
    flags = {"model": "tiny", "data_dir": catalogue, "max_train_pairs": 24, "num_workers": 0}
    flags |= {"effective_batch_size": 12, "micro_batch_size": 6, "epochs": 2, "precision": "fp32"}
    setup = prepare(load_settings(flags, environ={}).values, lambda note: None, ALONE)
    state = TrainState(setup.loaded.model, setup.make_optimizer(), setup.epoch_plan.steps)
    real = setup.make_accumulation(state.optimizer, print)
    used = list[weakref.ref]()
    held = list[int]()
    read = PairDataset.__getitem__

    def reading(self, place):
        held.append(sum(batch() is not None for batch in used))
        return read(self, place)

    class Accumulate:
        recovery = real.recovery
        lower_bound = real.lower_bound

        drift = real.drift

        def __call__(self, step, micro_batches, pairs, general):
            used[:] = map(weakref.ref, micro_batches)
            return real(step, micro_batches)

    monkeypatch.setattr(PairDataset, "__getitem__", reading)
    skipped = SkippedPairs(tmp_path / "skipped.jsonl", 24, setup.settings, ALONE)
    steps = list(fit(state, step_batches(setup, state, skipped), Accumulate()))
    assert [step.pairs for step in steps] == [12, 12, 12, 12]
    assert len(used) == 2 and held == [0] * 48
