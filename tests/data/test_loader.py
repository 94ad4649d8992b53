import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from clipft.config.settings import Settings
from clipft.core.errors import DataError
from clipft.data import loader
from clipft.data.batch import Batch
from clipft.data.images.augmentation import augment
from clipft.data.loader import LoaderOptions, evaluation_batches, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from clipft.data.workers import SharedPixels, end_workers
from tests import inputs
from tests.conftest import write_shard
from tests.data.pixel_filler import fill

EPOCHS = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_shard(folder / "00000.tar", range(20), bad=[3, 11])
    write_shard(folder / "00001.tar", range(20, 30))
    return open_pairs(folder)


@pytest.fixture(scope="module")
def preprocessing():
    return inputs.preprocessing()


def steps(dataset, preprocessing, workers=0, start=None, micro=4):
    start = start or Position()
    plan = EpochPlan(len(dataset), 12, micro, seed=5)
    return list(
        training_batches(dataset, preprocessing, plan, start, EPOCHS, LoaderOptions(workers))
    )


def flat(steps):
    return [
        (step.epoch, step.step, batch.numbers, batch.pixel_values, batch.input_ids)
        for step in steps
        for batch in step.micro_batches
    ]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one[:3] == other[:3]
        assert torch.equal(one[3], other[3])
        assert torch.equal(one[4], other[4])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset, preprocessing, workers):
    expected = flat(steps(dataset, preprocessing))
    torch.manual_seed(99)  # nor does the state of the global generator
    assert_equal(flat(steps(dataset, preprocessing, workers)), expected)


@pytest.mark.parametrize("start", [Position(0, 1), Position(1, 0), Position(1, 2), Position(2, 0)])
def test_a_resumed_run_yields_the_tail_of_the_whole_run(dataset, preprocessing, start):
    whole = steps(dataset, preprocessing)
    tail = [step for step in whole if (step.epoch, step.step) >= (start.epoch, start.step)]
    assert_equal(flat(steps(dataset, preprocessing, start=start)), flat(tail))


def test_bad_pairs_are_skipped_and_named_and_the_others_are_seen_once_an_epoch(
    dataset, preprocessing
):
    whole = steps(dataset, preprocessing)
    for epoch in range(EPOCHS):
        mine = [step for step in whole if step.epoch == epoch]
        numbers = [n for step in mine for batch in step.micro_batches for n in batch.numbers]
        assert sorted(numbers) == [n for n in range(30) if n not in (3, 11)]
        assert {s.key for step in mine for s in step.skipped} == {"00003", "00011"}


def test_a_micro_batch_of_bad_pairs_only_vanishes(tmp_path, preprocessing):
    write_shard(tmp_path / "a.tar", range(4), bad=range(4))
    batches = steps(open_pairs(tmp_path), preprocessing, micro=2)
    assert all(step.micro_batches == [] and len(step.skipped) == 4 for step in batches)


def test_augmentation_differs_between_epochs_and_pairs_and_seeds(dataset, preprocessing):
    whole = flat(steps(dataset, preprocessing, micro=1))
    by_number = {}
    for epoch, _, numbers, pixels, _ in whole:
        by_number.setdefault(numbers, []).append((epoch, pixels))
    changed = [not torch.equal(a[1], b[1]) for a, b in by_number.values()]
    assert sum(changed) > len(changed) / 2


def test_evaluation_has_every_pair_in_order(dataset, preprocessing):
    for size in (1, 7, 100):
        batches = list(evaluation_batches(dataset, preprocessing, size, LoaderOptions()))
        numbers = [n for batch in batches for n in batch.numbers]
        assert numbers == [n for n in range(30) if n not in (3, 11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_of_several_chunks_are_the_same_as_of_one(
    dataset, preprocessing, monkeypatch, workers
):
    expected = flat(steps(dataset, preprocessing, micro=10))
    monkeypatch.setattr(loader, "CHUNK", 4)  # 10 pairs are chunks of 4, 4 and 2
    assert_equal(flat(steps(dataset, preprocessing, workers, micro=10)), expected)
    numbers = [numbers for _, _, numbers, _, _ in expected]
    assert any(3 not in ten and 11 not in ten and len(ten) == 10 for ten in numbers)
    assert any(len(ten) == 9 for ten in numbers)  # with a skipped pair


@pytest.mark.parametrize("workers", [0, 2])
def test_the_device_finishes_the_augmentation_with_the_same_bits(dataset, preprocessing, workers):
    expected = flat(steps(dataset, preprocessing))
    plan = EpochPlan(len(dataset), 12, 4, seed=5)
    options = LoaderOptions(workers, leave_shift=True)
    left = training_batches(dataset, preprocessing, plan, Position(), EPOCHS, options)
    batches = [batch for step in left for batch in step.micro_batches]
    assert all(len(batch.shifts) == len(batch) for batch in batches)
    pixels = [augment(batch.pixel_values, batch.shifts) for batch in batches]
    assert len(pixels) == len(expected)
    for ours, (*_, theirs, _) in zip(pixels, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert any(
        not torch.equal(b.pixel_values, ours) for b, ours in zip(batches, pixels, strict=True)
    )


@pytest.mark.parametrize("augmentation", ["none", "advanced"])
def test_other_augmentations_leave_nothing_to_the_device(dataset, augmentation):
    plan = EpochPlan(len(dataset), 12, 12, seed=5)
    options = LoaderOptions(leave_shift=True)
    how = inputs.preprocessing(augmentation)
    left = training_batches(dataset, how, plan, Position(), 1, options)
    expected = flat(training_batches(dataset, how, plan, Position(), 1, LoaderOptions()))
    left = list(left)
    assert all(batch.shifts is None for step in left for batch in step.micro_batches)
    assert_equal(flat(left), expected)


def test_a_part_of_a_batch_has_its_rows_everywhere():
    shifts = torch.arange(12).view(4, 3)
    batch = Batch(torch.arange(4), torch.arange(4) * 10, (5, 6, 7, 8), ("bad",), shifts)
    part = batch.part(slice(1, 3))
    assert (part.numbers, part.skipped) == ((6, 7), ())
    assert part.pixel_values.tolist() == [1, 2]
    assert part.input_ids.tolist() == [10, 20]
    assert torch.equal(part.shifts, shifts[1:3])


def test_memory_is_used_again_only_when_nothing_refers_to_it(dataset, preprocessing):
    batches = evaluation_batches(dataset, preprocessing, 4, LoaderOptions())
    first = next(batches)
    rows, contents = first.pixel_values[1:], first.pixel_values[1:].clone()
    address = first.pixel_values.data_ptr()
    del first
    held = [next(batches) for _ in range(2)]
    assert address not in {batch.pixel_values.data_ptr() for batch in held}
    assert torch.equal(rows, contents)  # a part of a batch keeps all of it
    del rows
    assert next(batches).pixel_values.data_ptr() == address


def test_the_memory_that_workers_share_is_known_beforehand(dataset, preprocessing, monkeypatch):
    made = []

    class Watched(loader.SharedPixels):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self.slots.nbytes)

    monkeypatch.setattr(loader, "SharedPixels", Watched)
    monkeypatch.setattr(loader, "CHUNK", 4)
    plan = EpochPlan(len(dataset), 12, 6, seed=5)
    for workers in (1, 2):
        options = LoaderOptions(workers)
        next(training_batches(dataset, preprocessing, plan, Position(), 1, options))
        assert made.pop() == loader.shared_bytes(plan, preprocessing.image_size, options)


def test_shared_memory_is_bounded_however_large_the_step():
    options = LoaderOptions(16)
    assert loader.shared_bytes(EpochPlan(10**6, 32768, 1024, 5), 224, options) <= 2**30 + 2**24
    least = (2 * 16 + 1) * 64 * 3 * 448**2  # two chunks each
    assert loader.shared_bytes(EpochPlan(10**6, 32768, 1024, 5), 448, options) == least


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_shared_pixels_reach_a_process_however_it_starts(method):
    context = multiprocessing.get_context(method)
    pixels = SharedPixels((2, 3))
    child = context.Process(target=fill, args=(pixels,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert pixels.slots.tolist() == [[0, 0, 0], [7, 7, 7]]


def test_shared_pixels_work_where_the_system_has_no_memory_files(monkeypatch):
    monkeypatch.setattr("clipft.data.workers.ctypes.CDLL", lambda name: object())
    pixels = SharedPixels((2, 3))
    pixels.slots[1] = 7
    assert pixels.slots.sum() == 21


def test_the_default_number_of_workers_follows_from_the_processors(monkeypatch):
    default, three = Settings(), Settings(num_workers=3)
    for there, sharers, expected, asked in (
        (1, 1, 1, 1),
        (2, 1, 2, 2),
        (4, 1, 3, 3),
        (8, 2, 3, 3),
        (8, 8, 1, 1),
        (64, 1, 12, 3),
        (192, 8, 12, 3),
    ):
        monkeypatch.setattr("clipft.config.sections.data.processors", lambda there=there: there)
        assert (default.workers(sharers), three.workers(sharers)) == (expected, asked)
    assert Settings(num_workers=0).workers() == 0


def test_the_global_generator_is_left_alone(dataset, preprocessing):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    steps(dataset, preprocessing)
    assert torch.equal(torch.rand(1), expected)


def test_the_workers_together_prepare_a_whole_step():
    plan = EpochPlan(4096, 1024, 64, seed=5)
    for workers in (1, 2, 16):
        assert workers * loader.prefetch_factor(plan, 224, LoaderOptions(workers)) >= 16


LEFT_OVER = """
from pathlib import Path
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from tests.inputs import preprocessing

plan = EpochPlan(30, 4, 4, 5)
held = training_batches(
    open_pairs(Path({folder!r})), preprocessing(), plan, Position(), 9, LoaderOptions(2)
)
next(held)
"""


@pytest.mark.slow
def test_workers_that_are_still_wanted_do_not_keep_the_program_from_ending(dataset):
    script = (
        LEFT_OVER.format(folder=str(dataset.shards[0].path.parent)) + "import sys\nsys.x = held"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240, cwd=root)


def test_a_worker_that_was_killed_with_a_lock_in_hand_ends_too():
    """Torch's event has a lock, and a worker may be killed while it checks the event."""
    batches = iter(torch.utils.data.DataLoader(list(range(8)), num_workers=1))
    next(batches)
    batches._workers_done_event._cond.acquire()
    ending = threading.Thread(target=end_workers, args=(batches,), daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive() and not any(w.is_alive() for w in batches._workers)


def test_the_next_step_is_read_and_on_its_way_when_the_present_one_begins():
    happened = list[str]()

    def read():
        for number in range(3):
            happened.append(f"read {number}")
            yield number + 1
        raise DataError("the third is broken", "")

    batches = loader.one_ahead(read(), lambda batch: happened.append(f"copy {batch - 1}"))
    with pytest.raises(DataError, match="third"):
        for batch in batches:
            happened.append(f"step {batch - 1}")
    assert happened == [
        "read 0",
        *("read 1", "copy 1", "step 0"),
        *("read 2", "copy 2", "step 1"),
        "step 2",  # the error comes after the last good step
    ]
