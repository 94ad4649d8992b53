import hashlib
import os
import pickle
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch

from clipft.core.errors import ModelError, StorageError
from clipft.runs import checkpoint as checkpoint_pair
from clipft.runs.checkpoint import (
    DamagedCheckpoint,
    check_checkpoint,
    check_resumable,
    load_checkpoint,
    load_newest,
    previous_of,
    restore_previous,
    save_checkpoint,
    save_newest,
)
from clipft.runs.checkpoint_format import Weight

CONTENT = {
    "epoch": 1,
    "model_state_dict": {"w": torch.arange(4096.0)},
    "settings": {"lr": 1.0},
    "base_model": {"name": "x", "fingerprint": "y"},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "dual_lora_checkpoint.pt"
    save_checkpoint(path, CONTENT)
    return path


def test_round_trip_with_torch_alone(saved):
    content = torch.load(saved, weights_only=True)
    assert content["epoch"] == 1
    assert torch.equal(content["model_state_dict"]["w"], CONTENT["model_state_dict"]["w"])
    assert load_checkpoint(saved)["settings"] == {"lr": 1.0}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def flip_a_bit(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + len(data) // 4] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_bit, "damaged"),
        (truncate, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("{}"), "damaged"),
        (lambda path: path.unlink(), "no checkpoint"),
        (lambda path: torch.save({"epoch": 1}, path), "not a checkpoint of clipft"),
        (lambda path: torch.save({**CONTENT, "format_version": 99}, path), "newer clipft"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(saved, harm, message):
    harm(saved)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "damaged"),
        (lambda path: path.write_text("{}"), "damaged"),
        (lambda path: path.unlink(), "no checkpoint"),
        (lambda path: torch.save({"epoch": 1}, path), "not a checkpoint of clipft"),
        (lambda path: torch.save([1], path), "not a checkpoint of clipft"),
        (lambda path: torch.save({**CONTENT, "format_version": 99}, path), "newer clipft"),
    ],
)
def test_what_can_be_told_without_torch_is_refused_in_the_same_words(saved, harm, message):
    harm(saved)
    with pytest.raises(ModelError, match=message) as expected:
        load_checkpoint(saved)
    with pytest.raises(ModelError) as refused:
        check_checkpoint(saved)
    assert (refused.value.message, refused.value.hint) == (
        expected.value.message,
        expected.value.hint,
    )


def test_without_torch_everything_but_the_weights_is_read(saved):
    content, checked = load_checkpoint(saved), check_checkpoint(saved)
    assert isinstance(checked["model_state_dict"].pop("w"), Weight)
    assert checked == {**content, "model_state_dict": {}}
    save_newest(saved, {**CONTENT, "epoch": 2, "optimizer_state_dict": some_optimizer_state()})
    assert check_checkpoint(saved)["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.5


def some_optimizer_state():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def test_a_damaged_file_is_passed_over_without_torch_as_with_it(saved):
    save_newest(saved, {**CONTENT, "epoch": 2})
    truncate(saved)
    whole = load_newest(saved, check_checkpoint)
    assert (whole.content["epoch"], whole.path) == (1, previous_of(saved))


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    target = tmp_path / "executed"
    torch.save({**CONTENT, "format_version": 1, "bomb": Bomb(target)}, saved)
    assert check_checkpoint(saved) == {}, "only torch can say what is wrong with it"
    with pytest.raises(ModelError, match="holds code"):
        load_checkpoint(saved)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # the bomb works


@contextmanager
def files_of_at_most(size):
    """Simulate a full disk: writing more fails with an error, and no signal kills the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 1000, 9000, -81, -80, -1])
def test_a_failed_save_leaves_both_files_and_says_what_it_needed(saved, size):
    """It may fail while torch writes (positive sizes) or in the checksum (-80 to -1)."""
    save_newest(saved, {**CONTENT, "epoch": 2})
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}
    whole = len(before[saved.name])
    with (
        files_of_at_most(size if size >= 0 else whole + size),
        pytest.raises(StorageError, match=rf"{saved}: File too large, [\d,]+ bytes were needed"),
    ):
        save_newest(saved, {**CONTENT, "epoch": 3})
    assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before
    with files_of_at_most(whole):
        save_newest(saved, {**CONTENT, "epoch": 3})
    assert load_checkpoint(saved)["epoch"] == 3
    assert load_checkpoint(previous_of(saved))["epoch"] == 2


def test_every_bit_is_checked(saved):
    data = bytearray(saved.read_bytes())
    for at in range(0, len(data), 97):
        data[at] ^= 1 << at % 8
        saved.write_bytes(data)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(saved)
        data[at] ^= 1 << at % 8
    saved.write_bytes(data)
    load_checkpoint(saved)


@pytest.mark.parametrize("cut", [1, 2, 79, 80, 81, 100, 5000])
def test_every_truncation_is_found(saved, cut):
    saved.write_bytes(saved.read_bytes()[:-cut])
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(saved)


def test_any_program_can_check_it(saved):
    """The bytes are those that docs/guides/runs.md describes."""
    data = saved.read_bytes()
    assert data[-80:-64] == b"N\0clipft sha256 "
    assert data[-64:].decode() == hashlib.sha256(data[:-80] + b"\0\0").hexdigest()


def test_format_1_can_still_be_read(tmp_path):
    path = tmp_path / "dual_lora_checkpoint.pt"
    torch.save({**CONTENT, "format_version": 1}, path)
    assert load_checkpoint(path)["epoch"] == 1
    flip_a_bit(path)
    with pytest.raises(DamagedCheckpoint, match="CRC-32"):
        load_checkpoint(path)


def test_records_that_unpack_to_more_than_the_file_are_refused(saved):
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(DamagedCheckpoint, match="compressed"):
        load_checkpoint(saved)


def test_the_previous_checkpoint_is_used_if_the_newest_is_damaged(saved):
    assert not previous_of(saved).exists()
    for epoch in (2, 3):
        save_newest(saved, {**CONTENT, "epoch": epoch})
        assert load_checkpoint(previous_of(saved))["epoch"] == epoch - 1
    flip_a_bit(saved)
    with pytest.raises(ModelError) as refused:
        load_checkpoint(saved)
    assert str(previous_of(saved)) in refused.value.hint
    whole = load_newest(saved)
    assert (whole.content["epoch"], whole.path) == (2, previous_of(saved))
    assert "SHA-256" in whole.damage.message
    aside = restore_previous(saved)
    assert load_checkpoint(saved)["epoch"] == 2 and aside.exists()
    save_newest(saved, {**CONTENT, "epoch": 4})
    assert load_checkpoint(previous_of(saved))["epoch"] == 2


def test_it_is_an_error_if_both_are_damaged(saved):
    save_newest(saved, CONTENT)
    for path in (saved, previous_of(saved)):
        truncate(path)
    with pytest.raises(DamagedCheckpoint):
        load_newest(saved)


def test_without_hard_links_the_previous_checkpoint_is_kept_too(saved, monkeypatch):
    def refused(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint_pair.os, "link", refused)
    save_newest(saved, {**CONTENT, "epoch": 2})
    assert load_checkpoint(saved)["epoch"] == 2
    assert load_checkpoint(previous_of(saved))["epoch"] == 1
    saved.unlink()  # killed between the two names
    assert load_newest(saved).content["epoch"] == 1
    assert restore_previous(saved) is None
    assert load_checkpoint(saved)["epoch"] == 1


def test_weights_alone_cannot_be_resumed(saved):
    content = load_checkpoint(saved) | {"step": 3, "before": {}}
    with pytest.raises(ModelError, match="no run to resume: it has no step_in_epoch, loss"):
        check_resumable(saved, content)


OF_FORMAT_2 = {
    **CONTENT,
    "settings": {"effective_batch_size": 10},
    **{"step": 2, "step_in_epoch": 2, "loss": 1.0, "epoch_loss_sum": 5.0, "train_pairs": 23},
    "optimizer_state_dict": {"state": {0: {"exp_avg": 1}}},
    **{"scheduler_state_dict": {}, "scaler_state_dict": {}, "skipped_in_a_row": 0},
    **{"early_stopping": {}, "before": {}, "skipped_pairs": 0},
}


def read_as_format_2(path, **given):
    torch.save({**OF_FORMAT_2, **given, "format_version": 2}, path)
    data = path.read_bytes()
    comment = b"clipft sha256 " + hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data[:-2] + len(comment).to_bytes(2, "little") + comment)
    content = load_checkpoint(path)
    check_resumable(path, content)
    return content


@pytest.mark.parametrize(
    ("given", "loss", "pairs"),
    [
        ({}, 2.5, 20),
        ({"step_in_epoch": 0, "epoch_loss_sum": 6.0}, 2.0, 23),  # the epoch has ended: 3 steps
        ({"step_in_epoch": 0, "epoch_loss_sum": 6.0, "train_pairs": 21}, 3.0, 21),  # 10 and 11
        ({"step_in_epoch": 1, "train_pairs": 4}, 5.0, 4),
    ],
)
def test_a_run_of_format_2_goes_on_with_its_mean_loss_and_its_steps(saved, given, loss, pairs):
    content = read_as_format_2(saved, **given)
    assert content["epoch_loss_sum"] / content["epoch_pairs"] == pytest.approx(loss)
    assert content["epoch_pairs"] == pairs
    assert content["choices"] == {"precision": "", "optimizer": "adamw", "smallest_step": 2}


def test_what_a_run_of_format_2_began_with_is_read_from_its_states(saved):
    states = {"optimizer_state_dict": {"state": {0: {"state1": 1}}}, "scaler_state_dict": {"a": 1}}
    chosen = read_as_format_2(saved, **states)["choices"]
    assert chosen == {"precision": "fp16", "optimizer": "adamw8bit", "smallest_step": 2}
