"""A shard is replaced, cut or removed while it is in use (22).

The run must notice it, and never train on the wrong pairs.
"""

import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from clipft.cli import running
from clipft.cli.app import run
from clipft.core.errors import DataError
from clipft.data.loader import LoaderOptions, training_batches
from clipft.data.order import EpochPlan, Position
from clipft.data.shards.folders import open_pairs
from clipft.runs.checkpoint import load_checkpoint
from clipft.runs.records import StepResult, TrainingCallback
from tests.faults.helpers import Member, catalogue, good, lines, one_error, train, write_tar
from tests.inputs import preprocessing

SIZES = ["--effective-batch-size", "4", "--micro-batch-size", "4", "--checkpoint-every", "1"]


def later(path: Path) -> None:
    """Move the modification time by a second, so that it differs on every file system."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def even(numbers: Iterable[int]) -> list[Member]:
    """Make pairs that all take the same number of bytes."""
    return [
        (name, data.ljust(200 if name.endswith("txt") else 6000, b"\0"))
        for name, data in good(numbers)
    ]


def wrong(path: Path) -> bytes:
    """Return a shard of the same size with other keys, and with the captions moved by one."""
    with tarfile.open(path) as tar:
        contents = [tar.extractfile(member).read() for member in tar]
    images, captions = contents[::2], contents[1::2]
    other = path.with_name("other")
    pairs = enumerate(zip(images, [*captions[1:], captions[0]], strict=True))
    write_tar(
        other,
        [
            member
            for i, (image, caption) in pairs
            for member in ((f"x{i:04d}.jpg", image), (f"x{i:04d}.txt", caption))
        ],
    )
    data = other.read_bytes()
    other.unlink()
    assert len(data) == path.stat().st_size
    return data


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(wrong(path))
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 10**9))
    other.replace(path)


def overwrite(path: Path) -> None:
    data = wrong(path)
    with path.open("r+b") as file:
        file.write(data)
    later(path)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def cut(path: Path) -> None:
    os.truncate(path, 1000)


HARMS: list[Callable[[Path], None]] = [Path.unlink, replace, overwrite, grow, cut]
harmed = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)


class Saboteur(TrainingCallback):
    """Harms the data of a run after one of its steps."""

    def __init__(self, step: int, harm: Callable[[], None]) -> None:
        self.step, self.harm = step, harm

    def stepped(self, result: StepResult) -> None:
        if result.step == self.step:
            self.harm()


def train_with_harm(folder: Path, monkeypatch, step: int, harm, *more: str) -> int:
    path = folder / "train" / "00000.tar"
    saboteur = Saboteur(step, lambda: harm(path))
    with monkeypatch.context() as patch:
        patch.setattr(running, "make_progress", lambda *_: saboteur)
        return train(folder, *SIZES, *more)


@harmed
def test_every_change_is_noticed_when_the_shard_is_next_read(tmp_path, harm):
    path = tmp_path / "a.tar"
    write_tar(path, even(range(4)))
    pairs = open_pairs(tmp_path)
    sent = pickle.dumps(pairs)  # as to a worker that starts later
    assert pairs[3].key == "00003"
    harm(path)
    for dataset in (pairs, pickle.loads(sent)):
        for number in range(4):
            with pytest.raises(DataError, match=r"a\.tar was changed or removed while"):
                dataset[number]


@harmed
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_notice_a_changed_shard(tmp_path, harm, workers):
    write_tar(tmp_path / "a.tar", even(range(60)))
    batches = training_batches(
        open_pairs(tmp_path),
        preprocessing(),
        EpochPlan(60, 4, 4, 5),
        Position(),
        1,
        LoaderOptions(workers),
    )
    others = multiprocessing.active_children()
    next(batches)
    harm(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar was changed or removed"):
        list(batches)
    assert multiprocessing.active_children() == others


@pytest.mark.parametrize(
    ("harm", "code"),
    [pytest.param(Path.unlink, 3, marks=pytest.mark.slow), (replace, 2)],
    ids=["removed", "replaced"],
)
def test_the_run_exits_3_and_resumes_once_the_shard_is_back(
    tmp_path, monkeypatch, capsys, harm, code
):
    catalogue(tmp_path, even(range(12)))
    path = tmp_path / "train" / "00000.tar"
    was, checkpoint = path.read_bytes(), tmp_path / "out" / "dual_lora_checkpoint.pt"
    assert train_with_harm(tmp_path, monkeypatch, 2, harm) == 3
    error, hint = one_error(capsys)
    assert error == f"{path} was changed or removed while it was in use"
    assert hint == "restore the shard, then run `clipft resume`"
    saved = load_checkpoint(checkpoint)
    assert (saved["step"], saved["finished"]) == (2, False)
    assert not list(tmp_path.rglob("*.part"))

    assert run(["resume", str(checkpoint)]) == code  # neither with other pairs nor without any
    assert load_checkpoint(checkpoint)["step"] == 2
    path.write_bytes(was)
    assert run(["resume", str(checkpoint)]) == 0
    metrics = lines(tmp_path / "out" / "dual_lora" / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["kind"] == "step"] == [1, 2, 3]


def test_a_resumed_run_refuses_another_shard_with_as_many_pairs(tmp_path):
    def identity(members) -> str:
        write_tar(tmp_path / "a.tar", members)
        return open_pairs(tmp_path).identity()

    first = identity(good(range(4)))
    assert identity(good([0, 1, 2, 5])) != first
    assert identity([(name, data + b"!") for name, data in good(range(4))]) != first
    assert identity(good(range(4))) == first


def test_a_changed_validation_shard_is_noticed(tmp_path, monkeypatch, capsys):
    catalogue(tmp_path, even(range(8)))
    val = tmp_path / "val" / "00000.tar"
    write_tar(val, even(range(4)))
    assert train_with_harm(tmp_path, monkeypatch, 2, lambda _: replace(val)) == 3
    assert one_error(capsys)[0] == f"{val} was changed or removed while it was in use"


def test_a_resumed_run_repeats_a_validation_that_failed(tmp_path, monkeypatch):
    catalogue(tmp_path, even(range(8)))
    val, out = tmp_path / "val" / "00000.tar", tmp_path / "out"
    write_tar(val, even(range(4)))
    assert train(tmp_path, *SIZES, "--epochs", "2") == 0
    whole = lines(out / "dual_lora" / "metrics.jsonl")
    was, state = val.read_bytes(), val.stat()
    args = ("--epochs", "2")
    assert train_with_harm(tmp_path, monkeypatch, 2, lambda _: replace(val), *args) == 3
    val.write_bytes(was)
    os.utime(val, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert train(tmp_path, *SIZES, *args, "--resume-from-checkpoint") == 0
    resumed = lines(out / "dual_lora" / "metrics.jsonl")
    assert [timeless(line) for line in resumed] == [timeless(line) for line in whole]


def timeless(line: dict) -> dict:
    return {k: v for k, v in line.items() if "second" not in k and "per_s" not in k}


def test_the_error_is_the_same_from_a_worker(tmp_path, monkeypatch, capsys):
    catalogue(tmp_path, even(range(60)))
    path = tmp_path / "train" / "00000.tar"
    assert train_with_harm(tmp_path, monkeypatch, 1, Path.unlink, "--num-workers", "1") == 3
    assert one_error(capsys)[0] == f"{path} was changed or removed while it was in use"


def test_the_state_is_saved_when_a_shard_disappears(tmp_path, monkeypatch, capsys):
    catalogue(tmp_path, even(range(12)))
    no_checkpoints = ("--checkpoint-every", "0")
    assert train_with_harm(tmp_path, monkeypatch, 2, Path.unlink, *no_checkpoints) == 3
    assert "clipft resume" in one_error(capsys)[1]
    assert load_checkpoint(tmp_path / "out" / "dual_lora_checkpoint.pt")["step"] == 2
